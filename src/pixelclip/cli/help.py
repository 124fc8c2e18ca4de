"""Help of the command line: commands in groups with whole summaries, one example per command."""

from typing import Any

from typer.core import TyperGroup

EXAMPLES = {
    "toy": "pixelclip toy --out runs/demo/toy",
    "fetch_data": "pixelclip fetch_data --repo https://git.example/data.git --out work/data path=images",
    "shards": "pixelclip shards --images photos --out work/shards",
    "masks": "pixelclip masks --shards work/shards --out work/masks generator=felzenszwalb",
    "train": "pixelclip train --masks work/masks --out work/model clip=toy steps=500",
    "evaluate_clip": "pixelclip evaluate_clip --labelled runs/demo/toy/toy --out work/clip --clip toy",
    "evaluate": "pixelclip evaluate --model work/model --labelled runs/demo/toy/toy --out work/evaluation",
    "register": "pixelclip register --model work/model --evaluation work/evaluation --out work/registration",
    "predict": "pixelclip predict photo.jpg --classes 'dog|puppy,grass,sky' --model work/model --out labels.png",
    "merge": "pixelclip merge work/parts --out work/predictions",
    "app": "pixelclip app --model models:/pixelclip-toy@champion",
    "import": "pixelclip import released.pth --out work/model",
    "export": "pixelclip export --model work/model --out work/onnx --format onnx --classes 'dog,grass,sky'",
    "promote": "pixelclip promote pixelclip 3",
    "lineage": "pixelclip lineage models:/pixelclip@champion",
    "reproduce": "pixelclip reproduce models:/pixelclip@champion --out work/again",
    "sweep": "pixelclip sweep sweeps/paper.yaml --masks work/masks --labelled runs/demo/toy/toy --out work/sweep",
    "settings": "pixelclip settings",
    "doctor": "pixelclip doctor --s3 s3://bucket/images",
    "gc": "pixelclip gc runs --older-than 30d --keep 20",
    "toy-clip": "pixelclip toy-clip --out work/toy_clip",
    "pipeline submit": "pixelclip pipeline submit --repo https://git.example/data.git --images images --labelled labelled",
    "pipeline status": "pixelclip pipeline status RUN_ID --watch",
    "pipeline logs": "pixelclip pipeline logs RUN_ID train",
    "pipeline cancel": "pixelclip pipeline cancel RUN_ID",
    "pipeline doctor": "pixelclip pipeline doctor --cluster cluster.yaml",
    "pipeline run": "pixelclip pipeline run --images photos --labelled labelled --out work",
    "pipeline compile": "pixelclip pipeline compile --out pixelclip.yaml",
    "pipeline compile-sweep": "pixelclip pipeline compile-sweep sweeps/paper.yaml --out sweep.yaml",
    "pipeline submit-sweep": "pixelclip pipeline submit-sweep sweep.yaml --masks s3://bucket/masks --labelled s3://bucket/labelled",
    "pipeline compile-predict": "pixelclip pipeline compile-predict --out predict.yaml",
    "pipeline submit-predict": "pixelclip pipeline submit-predict --images s3://bucket/photos --classes 'dog|puppy,grass,sky'",
    "schedule create": "pixelclip pipeline schedule create nightly --images images --labelled labelled --cron '0 3 * * *'",
    "schedule list": "pixelclip pipeline schedule list",
    "schedule delete": "pixelclip pipeline schedule delete SCHEDULE_ID",
    "serve run": "pixelclip serve run models:/pixelclip@champion --port 5107 --follow 30",
    "serve manifest": "pixelclip serve manifest models:/pixelclip@champion | kubectl apply -f -",
}
"""By the names of group and command, without the root's."""
_GROUPS = {
    "Stages": ("toy", "fetch_data", "shards", "masks", "train", "evaluate_clip", "evaluate", "register"),
    "Use a model": ("app", "predict", "merge", "serve", "export", "import"),
    "Registered models": ("promote", "lineage", "reproduce"),
}
_OTHER = "More"


class Group(TyperGroup):
    """A group of commands whose help lists them in groups, if it is the root."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        for name, command in self.commands.items():
            if example := EXAMPLES.get(name if self.name == "pixelclip" else f"{self.name} {name}"):
                command.epilog = f"\b\nExample:\n  {example}"

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write the first sentence of every command's help; it wraps instead of being cut."""
        grouped = {name: group for group, names in _GROUPS.items() for name in names} if self.name == "pixelclip" else {}
        sections: dict[str, list[tuple[str, str]]] = {group: [] for group in grouped.values()}
        for name in self.list_commands(ctx):
            summary = (self.commands[name].help or "").strip().partition("\n")[0]
            sections.setdefault(grouped.get(name, _OTHER if grouped else "Commands"), []).append((name, summary))
        for title, rows in sections.items():
            if rows:
                with formatter.section(title):
                    formatter.write_dl(rows)
