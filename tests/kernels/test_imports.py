import subprocess
import sys


def test_importing_msa_kernels_imports_neither_megatron_nor_triton():
    program = (
        "import sys, torch; before = set(sys.modules); import msa_kernels; "
        "new = {name.split('.')[0] for name in set(sys.modules) - before}; "
        "print(sorted(new & {'triton', 'megatron', 'megatron_msa', 'transformer_engine'}))"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
