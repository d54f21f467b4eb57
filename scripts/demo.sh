#!/usr/bin/env bash
# The whole job on built-in data: train an early, a late and a MoE model of equal (active) size, serve and evaluate
# each with vLLM, compare. OUT is where everything goes, STEPS scales both stages of training, IMAGES the evaluation.
set -euo pipefail
out=${OUT:-demo}
steps=${STEPS:-350}
images=${IMAGES:-250}

[ -d "$out/data" ] || nmm-train data builtin "$out/data" --split test --images "$images"
for family in early late moe; do
    echo "== $family: pretraining, then fine-tuning"
    nmm-train run demo --out "$out/$family/pretrain" --set model.family=$family --set steps="$steps"
    nmm-train run demo-sft --out "$out/$family/sft" --set model.family=$family --set steps="$steps" \
        --set init_from="$out/$family/pretrain/final"
done
for family in early late moe; do
    echo "== $family: served by vLLM, evaluated on the test split"
    nmm-eval all --model "$out/$family/sft/final" --name $family --engine vllm \
        --data "$out/data" --split test -o "$out/records/$family.json"
done
echo "== comparison"
nmm-eval table "$out"/records/*.json
nmm-eval report "$out"/records/*.json -o report.html --title "Early fusion, late fusion and mixture of experts"
