"""Where the time of a process goes, in percent: the samples of `perf record`, grouped by what they are spent on.

    CARGO_PROFILE_RELEASE_DEBUG=1 CARGO_PROFILE_RELEASE_STRIP=none RUSTFLAGS="-C symbol-mangling-version=v0" \\
        cargo build --release -p lora-bench --bin cpu
    perf record -F 499 -o perf.data target/release/cpu --rows steady --rounds 1 --steps 60 --model GPT2
    perf report -i perf.data --stdio --no-children --sort symbol 2> /dev/null | python3 lora-bench/interop/step_profile.py

GPT2 is the folder of a GPT-2 small, so that no random one is written, and 60 steps leave little of what loading takes.

A symbol's name says whose code it is because v0 mangling keeps the types that generic code was made for; what several
crates share without a trace (rayon waiting, the kernel's page faults) has groups of its own. `--top N` lists the largest
symbols of each group, to see what the table hides.
"""

import argparse
import re
import sys

# The first pattern that a symbol's name matches decides: what is called stands before what calls it.
GROUPS = [
    ("attention", r"attention|softmax|gemm::blocked::direct"),
    ("GEMM", r"gemm|dpbf16|nano_gemm|matmul|lora_kernels::lora"),
    ("norm", r"::norm|layer_norm|rms_norm"),
    ("activation", r"activation|gelu|silu|\berf|tanh"),
    ("loss head", r"::loss|cross_entropy|nll"),
    ("optimiser", r"adamw|sum_squares|clip_factor"),
    ("elementwise", r"elementwise|axpby|add_bias|sum_rows|gather|scatter|dropout|rope|transpose|reduce|::fill"),
    ("memory", r"memset|memcpy|memmove|malloc|calloc|free|clear_page|page_fault|clear_huge|copy_user|\bpool\b|mmap|munmap"),
    ("waiting", r"rayon|crossbeam|futex|sched|yield|epoch|idle"),
]


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--top", type=int, default=0, help="list so many symbols of each group")
    args = p.parse_args()
    groups = collect(sys.stdin)
    total = sum(share for symbols in groups.values() for share, _ in symbols)
    if not total:
        sys.exit("no samples: give the text of `perf report --stdio --sort symbol`")
    print("| share | of |\n|---:|---|")
    for name, symbols in sorted(groups.items(), key=lambda g: -sum(s for s, _ in g[1])):
        print(f"| {100 * sum(s for s, _ in symbols) / total:.1f}% | {name} |")
        for share, symbol in sorted(symbols, reverse=True)[:args.top]:
            print(f"| {100 * share / total:.1f}% | &nbsp; `{symbol[:110]}` |")


def collect(lines):
    """Groups of (percent, symbol) from lines such as `  12.34%  [.] name`."""
    groups = {}
    for line in lines:
        if found := re.match(r"\s*([\d.]+)%\s+\[(.)\]\s+(.+?)\s*$", line):
            share, space, symbol = float(found[1]), found[2], found[3]
            other = "the kernel" if space == "k" else "other"
            name = next((name for name, pattern in GROUPS if re.search(pattern, symbol)), other)
            groups.setdefault(name, []).append((share, symbol))
    return groups


if __name__ == "__main__":
    main()
