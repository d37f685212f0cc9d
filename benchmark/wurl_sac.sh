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

ant() { # the main job, under 30 minutes on 2 cores
    python wurl_sac.py --num-policies 10
}

cheetah() {
    python wurl_sac.py --task cheetah
}

paper() { # 200k steps and updates a policy: 2 h 27 min on one core alone
    python wurl_sac.py --num-policies 10 --preset paper --out runs/wurl_sac/ant/paper-seed0
}

for part in "${@:-point}"; do $part; done
python benchmark/collect.py runs/wurl_sac/*/*
