#!/usr/bin/env bash
# Everything that has to hold before a change lands: lint, a build without warnings, the tests on
# each interpreter here, the distributions, and the integration tests once more on a cgroup v2
# kernel where $TEST_VM leads to one (scripts/test-vm.sh). A failed stage does not hide the next.
# The guests, one after the other, work beside all that is tested on this kernel; what they say is
# printed when they are done.
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

with_debian newuidmap uidmap
with_debian strace strace
with_debian mksquashfs squashfs-tools
with_debian mkfs.erofs erofs-utils
with_debian umoci umoci
with_debian skopeo skopeo
with_debian musl-gcc musl-tools
# Languages, below /usr, where Root.host() shows them.
with_debian /usr/bin/go golang-go
with_debian /usr/bin/rustc rustc
with_debian /usr/bin/node nodejs
with_debian /usr/bin/javac default-jdk-headless

. "$(dirname "${BASH_SOURCE[0]}")/beside.sh"

# What failed is named once more below the stages: the end of a long log is what people see.
stage() {
    local name=$1 began=$SECONDS word=passed log
    shift
    log=$(mktemp -p "$work")
    printf '\n==> %s\n' "$name"
    "$@" 2>&1 | tee "$log" || word=FAILED
    printf '%-8s %4d s  %s\n' "$word" $((SECONDS - began)) "$name" >>"$report"
    [[ $word == passed ]] || { grep -E '^(FAILED|ERROR|E  ) ?' "$log" || tail -n 20 "$log"; } |
        tail -n 40 | cut -c 1-300 | sed 's/^/         | /' >>"$report"
}
absent() {
    printf '%-8s %6s  %s\n' 'not run' '' "$1" >>"$report"
}

printf '==> wheel\n'
wheel=$(scripts/wheel.sh cmake.define.ISOJOB_WERROR=ON)
printf '%s\n' "$wheel"

report=$work/report
: >"$report"
read -ra users <<<"${TEST_VM_USERS:-root user systemd}"
guests() {
    local who report=$work/report-guests
    for who in "${users[@]}"; do
        stage "cgroup v2 guest as $who: integration" scripts/test-vm.sh "$who" "$wheel"
    done
}
if [[ -n ${TEST_VM:-} ]]; then
    scripts/test-vm.sh --prepare "$wheel"
    set -m
    guests >"$work/output-guests" 2>&1 </dev/null &
    set +m
    beside[guests]=$!
else
    absent "cgroup v2 guest: TEST_VM is not set"
fi

stage lint scripts/lint.sh "$wheel"
stage 'static analysis' scripts/analyse.sh

kernel="$(uname -r), $([[ -e /sys/fs/cgroup/cgroup.controllers ]] && echo cgroup v2 || echo cgroup v1), uid $(id -u)"
# Every test runs on both event loops, which two interpreters share; a single one has both. What a third
# one could do otherwise is in the modules that it runs.
loops=(asyncio trio)
mapfile -t pythons < <(scripts/pythons.sh)
for index in "${!pythons[@]}"; do
    IFS=$'\t' read -r version python <<<"${pythons[index]}"
    backend=${loops[index % 2]}
    ((${#pythons[@]} > 1)) || backend=
    what="unit, integration" tests=()
    if ((index >= 2)); then
        what="unit, what depends on it" tests=(tests/unit tests/integration/test_{cli,map,process,python*,run,session}.py)
    fi
    ISOJOB_TEST_BACKEND=$backend stage \
        "Python $version on this kernel ($kernel): $what${backend:+, on $backend}" \
        scripts/test-native.sh "$python" "$wheel" "${tests[@]}"
done
for version in $(scripts/pythons.sh --missing); do
    absent "Python $version: no interpreter on this machine"
done

# The legacy branch as an ordinary user; what v2 has of that runs in the guests.
if [[ $(id -u) == 0 && ! -e /sys/fs/cgroup/cgroup.controllers ]]; then
    ISOJOB_TEST_BACKEND=trio stage 'cgroup v1 on this kernel as uid 1000: integration, on trio' \
        scripts/test-user.sh "${pythons[0]#*$'\t'}" "$wheel"
fi

stage packaging scripts/test-native.sh "${pythons[0]#*$'\t'}" "$wheel" tests/packaging

stage 'integration with ASan and UBSan' scripts/sanitized.sh

stage 'fuzzers, 20 s each' scripts/fuzz.sh 20

if [[ -n ${beside[guests]:-} ]]; then
    wait "${beside[guests]}" || printf 'FAILED            cgroup v2 guests\n' >>"$report"
    unset "beside[guests]"
    cat "$work/output-guests"
    cat "$work/report-guests" >>"$report" || true
fi

printf '\n'
cat "$report"
! grep -q '^FAILED' "$report"
