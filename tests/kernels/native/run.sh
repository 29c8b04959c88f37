#!/usr/bin/env bash
# The self-test of the kernels (selftest.cpp), built in a scratch folder.
#   run.sh sanitize [CASES]   under AddressSanitizer and UBSan, on every instruction set that this processor has
#   run.sh aarch64 [CASES]    cross-compiled for NEON, under qemu-user (packages g++-aarch64-linux-gnu and qemu-user)
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
sources=$here/../../../src/halfplate/kernels/src
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
common=(-std=c++17 -fopenmp -fno-math-errno -ffp-contract=off -I "$sources")
avx2=(-mavx2 -mfma -mf16c)
avx512=("${avx2[@]}" -mavx512f -mavx512vl -mavx512bw -mavx512dq -mavx512vnni)

compile() { # COMPILER NAME FLAGS...
    local compiler=$1 name=$2
    shift 2
    "$compiler" "${common[@]}" "$@" -c "$sources/$name.cpp" -o "$scratch/$name.o"
}

case ${1:-} in
sanitize)
    flags=(-Og -g1 -fsanitize=address,undefined -fno-sanitize-recover=undefined)
    # Where the processor lacks AVX-512 its part is only linked, and its cases would run on baseline a second time.
    wide=("${flags[@]}") ran=(baseline avx2 avx512)
    grep -qw avx512_vnni /proc/cpuinfo || { wide=(-O0) ran=(baseline avx2); }
    for name in native pack armor_baseline runtime_baseline; do compile g++ $name "${flags[@]}"; done
    for part in armor runtime; do
        compile g++ ${part}_avx2 "${flags[@]}" "${avx2[@]}"
        compile g++ ${part}_avx512 "${wide[@]}" "${avx512[@]}"
    done
    # The reference is not what is watched. Threads that spin while they wait would take most of the time.
    g++ "${common[@]}" -O1 -c "$here/selftest.cpp" -o "$scratch/selftest.o"
    g++ -fopenmp "${flags[@]}" "$scratch"/*.o -o "$scratch/selftest"
    for isa in "${ran[@]}"; do
        OMP_NUM_THREADS=2 OMP_WAIT_POLICY=passive HALFPLATE_ISA=$isa "$scratch/selftest" "${2:-2000}"
    done
    ;;
aarch64)
    for name in native pack armor_baseline runtime_baseline; do compile aarch64-linux-gnu-g++ $name -O2; done
    aarch64-linux-gnu-g++ "${common[@]}" -O2 -static "$here/selftest.cpp" "$scratch"/*.o -o "$scratch/selftest"
    qemu-aarch64 "$scratch/selftest" "${2:-2000}"
    ;;
*)
    sed -n '2,4p' "$0" | cut -c3- >&2
    exit 2
    ;;
esac
