# What depends on the site and on the run. Every value that is empty must be set; submit.sh checks that before anything
# is submitted.
ACCOUNT=""                  # of the batch system
PARTITION=""                # with GPUs
TIME_LIMIT="02:00:00"       # per length; a job that runs out of it goes on where it was when submitted again
GPUS_PER_JOB=""             # = TENSOR_PARALLEL x CONTEXT_PARALLEL
SETUP=""                    # a command that makes `python` and `torchrun` the right ones, e.g. "source .venv/bin/activate"

CHECKPOINT=""               # folder of the run's checkpoints (--save of training)
OUTPUT=""                   # folder for the results, on a file system that all nodes see
TENSOR_PARALLEL=1
CONTEXT_PARALLEL=1

LENGTHS=(4096 8192 16384 32768 65536 131072)
EVALUATION=(                # further flags of tools/eval_long_context.py run
    --tasks needle multi_key multi_value multi_query variable_tracking common_words frequent_words
            perplexity selection serving
    --attention msa,dense --num-depths 11 --samples 10
)
