#!/usr/bin/env bash
# The whole job on built-in data: train an early, a late and a MoE model of equal (active) size, serve and evaluate
# each with vLLM, compare. OUT is where everything goes, PRETRAIN and SFT are the steps of the two stages of training,
# IMAGES is the size of the evaluation.
set -euo pipefail
out=${OUT:-demo}
images=${IMAGES:-250}
families="early late moe"

# Small products gain little from a second thread: three runs of one thread each are faster than one after the other.
cores=$(getconf _NPROCESSORS_ONLN)
threads=$((cores > 3 ? cores / 3 : 1))

train() {
    trap 'exit 143' TERM # the command in hand gets the signal too, and is let finish; the next one does not begin
    nmm-train run demo --out "$out/$1/pretrain" --set model.family="$1" ${PRETRAIN:+--set steps="$PRETRAIN"} &&
        nmm-train run demo-sft --out "$out/$1/sft" --set model.family="$1" ${SFT:+--set steps="$SFT"} \
            --set init_from="$out/$1/pretrain/final"
}

echo "== training: pretraining on captions and text, then fine-tuning on questions"
mkdir -p "$out"
runs=()
pids=()
watcher=
command=
# However this script ends, everything it started does, and what trains may still save a checkpoint.
stop() {
    kill -TERM -- $watcher $command "${pids[@]/#/-}" 2>/dev/null || true
    wait
}
trap stop EXIT
# As the command alone would, but a signal that comes to this script need not wait for its end.
run() {
    "$@" &
    command=$!
    wait $command
    command=
}
set -m # each training is a process group, and can be ended with its children
for family in $families; do
    OMP_NUM_THREADS=$threads train "$family" >"$out/$family.log" 2>&1 &
    pids+=($!)
    runs+=("$out/$family/pretrain" "$out/$family/sft")
done
set +m
nmm-train watch "${runs[@]}" &
watcher=$!
[ -d "$out/data" ] || run nmm-train data builtin "$out/data" --split test --images "$images" --jitter 2 --max-objects 3
for family in $families; do
    wait "${pids[0]}" || {
        echo "training of $family failed; the end of $out/$family.log:" >&2
        tail -n 5 "$out/$family.log" >&2
        exit 1
    }
    pids=("${pids[@]:1}")
done
wait $watcher
watcher=

for family in $families; do
    echo "== $family: served by vLLM, evaluated on the test split"
    run nmm-eval all --model "$out/$family/sft/final" --name $family --engine vllm \
        --data "$out/data" --split test -o "$out/records/$family.json"
done
echo "== comparison"
run nmm-eval table "$out"/records/*.json
run nmm-eval report "$out"/records/*.json -o report.html --title "Early fusion, late fusion and mixture of experts"
