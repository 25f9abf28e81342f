#!/bin/bash
# One run over two machines: sbatch experiments/slurm/two-machines.sh --preset llama-70b --methods tspin
# It samples and evaluates on the first machine's GPUs, and trains on those of both.
#SBATCH --job-name=tspin
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=2-00:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR2@600     # ten minutes before the end: the training in hand keeps its state

# The shell takes the signal, hands it on, and puts the job into the queue again, where it goes on.
tspin run --launcher accelerate --launcher-config fsdp2_two_machines "$@" &
run=$!
trap 'kill -USR2 $run' USR2
trap 'kill -TERM $run' TERM
wait $run; code=$?
while kill -0 $run 2>/dev/null; do wait $run; code=$?; done     # a signal that is handed on ends a wait
if [ $code -eq 140 ]; then scontrol requeue "$SLURM_JOB_ID"; fi  # 128 + SIGUSR2
if [ $code -eq 143 ]; then sleep infinity & wait; fi             # SIGTERM: Slurm knows whether it is to come again
exit $code
