"""KFP component sweep_table."""

from typing import List  # noqa: UP035  (KFP requires typing.List for lists of artifacts)

from kfp import dsl

from pixelclip_components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def sweep_table(
    name: str,
    runs: list,
    metrics: dsl.Input[List[dsl.Metrics]],  # noqa: UP006
    table: dsl.Output[dsl.Markdown],
    plot: dsl.Output[dsl.HTML],
):
    """Write a sweep's table and plot from the metrics of its runs."""
    from pathlib import Path

    from pixelclip.commands.sweep_results import gather, page, summarise
    from pixelclip.commands.sweep_results import table as markdown

    rows = summarise(gather(runs, [each.metadata for each in metrics]))
    Path(table.path).write_text(markdown(name, rows))
    Path(plot.path).write_text(page(name, rows))
