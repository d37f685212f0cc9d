#!/usr/bin/env bash
# The runs behind docs/wurl_sac.md. Pick parts by name: benchmark/wurl_sac.sh point scale ant paper
set -euo pipefail
cd "$(dirname "$0")/.."

point() { # 5 seeds, 5 to 8 minutes each on a core, two at a time
    for seed in 0 1 2 3 4; do python wurl_sac.py --task point --seed $seed; done
}

scale() { # reward scale on the point robot, 1 seed each; 4 to 14 minutes each on a core
    for scale in 0.3 3 10 50; do
        python wurl_sac.py --task point --reward-scale $scale --out runs/wurl_sac/point/scale$scale
    done
}

ant() { # the main job, three seeds; 34 to 36 minutes each on a core
    for seed in 0 1 2; do
        python wurl_sac.py --num-policies 10 --seed $seed --num-devices 1 --out runs/wurl_sac/ant/seed$seed
    done
    python -m envs.render runs/wurl_sac/ant/seed0 --together --episode last --width 480 --height 480
}

apwd() { # the paper's pay at the main job's budget, as before the ant had a preset of its own
    for seed in 0 1 2; do
        python wurl_sac.py --seed $seed --num-devices 1 --num-envs 2 --nearest total --own-weight 0 --reward-size 0 \
            --no-auto-alpha --out runs/wurl_sac/ant/apwd-seed$seed
    done
}

pay() { # which pay, seed 0, 33 minutes each on a core
    run() { python wurl_sac.py --num-devices 1 "${@:2}" --out "runs/wurl_sac/ant/pay-$1"; }
    run size --nearest total --own-weight 0
    run own-early --own-between 0.2 0.6
    run own-cheapest --own-between 0.2 0.6 --plan cheapest
    # half of the budget, entropy -4
    run size-18k --num-updates 18000 --nearest total --own-weight 0 --num-envs 2 --target-entropy -4
    run cheapest-18k --num-updates 18000 --plan cheapest --num-envs 2 --nearest total --own-weight 0 --reward-size 0 \
        --no-auto-alpha
}

metra() { # told of no feature, on the ant, half of the main job's budget; 19 minutes on a core
    python wurl_sac.py --objective metra --num-devices 1 --num-updates 18000 --out runs/wurl_sac/ant/metra-18k
}

downstream() { # the same learners on the best buffer of either source, towards 60 degrees; after ant and apwd
    # tau and ema-start are those that --preset cpu had when these were run
    local data task=ant-angle-60
    for source in seed0 apwd-seed0; do
        data=runs/udg_select/wurl-$source
        python udg_select.py --buffers runs/wurl_sac/ant/$source --task $task --size 50000 --out "$data" --overwrite
        python cped.py --dataset "$data/$task/top1-size50000.npz" --preset cpu --bc-only \
            --out runs/cped/$task/wurl-$source-bc
        python dac.py --dataset "$data/$task/top1-size50000.npz" --preset cpu --num-updates 6000 --eval-every 1000 \
            --tau 0.01 --ema-start 1000 --out runs/dac/$task/wurl-$source
    done
}

ended() { # do objectives that pay for being told apart pay for living? On the humanoid, where episodes end
    for objective in diayn dads; do
        python wurl_sac.py --task humanoid --objective $objective --num-policies 4 --hidden-sizes 256 256 \
            --episode-length 200 --num-envs 8 --updates-per-step 0.03125 --chunk 50 --num-updates 4000 \
            --eval-every 500 --num-devices 1 --out runs/wurl_sac/humanoid/$objective-seed0
    done
}

cheetah() {
    python wurl_sac.py --task cheetah
}

paper() { # 200k steps and updates a policy: 2 h 27 min on one core alone
    python wurl_sac.py --num-policies 10 --preset paper --out runs/wurl_sac/ant/paper-seed0
}

for part in "${@:-point}"; do $part; done
python benchmark/collect.py runs/wurl_sac/*/*
