"""Print docs/reference/engines.md from the table of engines."""

from __future__ import annotations

from lowbit.io.engines import RULES

HEAD = """# Will it load?

What engines accept of the files that `lowbit export` writes. `lowbit export` warns by this table, and `lowbit check`
runs the readers that are installed, which is the better answer where one is.

For each engine and its versions, the first row that fits decides. Each row says where it comes from: the engine's own
code, an issue or a pull request, or that it was run. None of the rows about vLLM and AutoAWQ was. The
table is `lowbit.io.engines`, and

    from lowbit.io.engines import Files, will_load
    will_load(Files("gptq", bits=3, group=128, symmetric=True))

asks it. This page is printed by `scripts/engines_page.py`.

| engine | versions | layouts | files | loads | why | source |
| --- | --- | --- | --- | --- | --- | --- |"""


def main() -> None:
    print(HEAD)
    for rule in RULES:
        cells = (
            rule.engine, rule.versions, ", ".join(rule.layouts), rule.condition(), rule.answer, rule.why, rule.source
        )  # fmt: skip
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
