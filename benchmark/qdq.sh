#!/bin/sh
# The commands behind docs/qdq.md. Each stands alone; run those you need from the repository's root.
set -e

# CPU budget: 2 cores, one seed (first two phases at a tenth of their steps, 20k policy updates)
python qdq.py --dataset runs/udg_select/ant-angle-60/top1-size50000.npz --preset cpu --out runs/qdq/ant-angle-60/top1-cpu

# the same with a short first stage, what docs/qdq.md shows
python qdq.py --dataset runs/udg_select/ant-angle-60/top1-size50000.npz --preset cpu \
    --teacher-updates 20000 --student-updates 20000 --out runs/qdq/ant-angle-60/top1-short

# without H, and cloning only, on its student
python qdq.py --dataset runs/udg_select/ant-angle-60/top1-size50000.npz --preset cpu --teacher-updates 20000 \
    --student-updates 20000 --student runs/qdq/ant-angle-60/top1-short/q_model.npz --alpha 1 \
    --out runs/qdq/ant-angle-60/top1-alpha1
python qdq.py --dataset runs/udg_select/ant-angle-60/top1-size50000.npz --preset cpu --teacher-updates 20000 \
    --student-updates 20000 --student runs/qdq/ant-angle-60/top1-short/q_model.npz --q-from 1 \
    --out runs/qdq/ant-angle-60/top1-clone

# a sweep of the policy's flags on one student
for weight in 0.05 0.2 1.0; do
    python qdq.py --dataset runs/udg_select/ant-angle-60/top1-size50000.npz --preset cpu \
        --student runs/qdq/ant-angle-60/top1-short/q_model.npz --gamma-ent $weight \
        --out runs/qdq/ant-angle-60/top1-gamma$weight
done

# point robot, three seeds
python qdq.py --quick --num-seeds 3 --out runs/qdq/point-angle-0/quick3

# published budget, for a GPU: 800k teacher, 1.6M student, 1M policy updates, five seeds at once
for task in ant-angle-60 cheetah-jump; do
    for data in top1 all; do
        python qdq.py --dataset "runs/udg_select/$task/$data.npz" --num-seeds 5 --out "runs/qdq/$task/$data"
    done
done

# the paper's settings on a D4RL set of the same name, converted to docs/buffer.md
python qdq.py --dataset data/halfcheetah-medium-v2.npz --num-seeds 5 --uncertainty mc
