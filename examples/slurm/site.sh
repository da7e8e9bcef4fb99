# What every site has to fill in, and what it may change. Sourced by the job files; variables of the environment win.

# -- required --
ACCOUNT="${ACCOUNT:-}"     # --account
PARTITION="${PARTITION:-}" # --partition
NODES="${NODES:-}"         # 64 for the layouts of ../msa_109b
LOGS="${LOGS:-}"           # folder on a file system that all nodes share
# One of the two: an image for pyxis (srun --container-image), or a folder with the Python environment.
IMAGE="${IMAGE:-}"
VENV="${VENV:-}"

# -- with defaults --
GPUS_PER_NODE="${GPUS_PER_NODE:-8}"  # also the processes of a node; 0: no --gpus-per-node, one process
CPUS_PER_TASK="${CPUS_PER_TASK:-8}"  # cores of a process: its threads, loaders of data, and the one that saves
TIME="${TIME:-24:00:00}"             # --time
SAVE_SECONDS="${SAVE_SECONDS:-900}"  # before the time limit: a step, a save, and some patience
MAX_RETRIES="${MAX_RETRIES:-3}"      # failures without a new checkpoint in between, before the job gives up
MOUNTS="${MOUNTS:-}"                 # srun --container-mounts; data, checkpoints, logs and this repository
SBATCH_FLAGS="${SBATCH_FLAGS:-}"     # further ones, for example --qos=... --exclude=...
SRUN_FLAGS="${SRUN_FLAGS:-}"

# -- network: what `ibdev2netdev` and `ip link` show; empty leaves NCCL to find out --
export NCCL_IB_HCA="${NCCL_IB_HCA:-}"               # for example mlx5_0,mlx5_1,...: cards for data, not for storage
export NCCL_SOCKET_IFNAME="${NCCL_SOCKET_IFNAME:-}" # the interface over which processes meet
