#!/usr/bin/env bash
# Everything that has to hold before a change lands: lint, a build without warnings, the tests on
# each interpreter here, the distributions, and the integration tests once more on a cgroup v2
# kernel where $TEST_VM leads to one (scripts/test-vm.sh). A failed stage does not hide the next.
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

report=()
failed=0
stage() {
    local name=$1 began=$SECONDS word=passed
    shift
    printf '\n==> %s\n' "$name"
    "$@" || { word=FAILED; failed=1; }
    report+=("$(printf '%-8s %4d s  %s' "$word" $((SECONDS - began)) "$name")")
}
absent() {
    report+=("$(printf '%-8s %6s  %s' 'not run' '' "$1")")
}

printf '==> wheel\n'
wheel=$(scripts/wheel.sh cmake.define.ISOJOB_WERROR=ON)
printf '%s\n' "$wheel"

stage lint scripts/lint.sh "$wheel"

kernel="$(uname -r), $([[ -e /sys/fs/cgroup/cgroup.controllers ]] && echo cgroup v2 || echo cgroup v1), uid $(id -u)"
mapfile -t pythons < <(scripts/pythons.sh)
for line in "${pythons[@]}"; do
    IFS=$'\t' read -r version python <<<"$line"
    stage "Python $version on this kernel ($kernel): unit, integration" \
        scripts/test-native.sh "$python" "$wheel"
done
for version in $(scripts/pythons.sh --missing); do
    absent "Python $version: no interpreter on this machine"
done

stage packaging scripts/test-native.sh "${pythons[0]#*$'\t'}" "$wheel" tests/packaging

if [[ -n ${TEST_VM:-} ]]; then
    for who in ${TEST_VM_USERS:-root user}; do
        stage "cgroup v2 guest as $who: integration" scripts/test-vm.sh "$who" "$wheel"
    done
else
    absent "cgroup v2 guest: TEST_VM is not set"
fi

printf '\n'
printf '%s\n' "${report[@]}"
exit "$failed"
