"""Training curves, drawn from what a run has logged."""

from pathlib import Path

from lightning_modules.report.curves import curves_figure, read_metrics


def write(folder: Path, *lines: str) -> None:
    folder.mkdir(parents=True)
    (folder / "metrics.csv").write_text("\n".join(lines) + "\n")


def test_a_resumed_run_is_one_curve_and_its_later_part_counts(tmp_path: Path) -> None:
    write(tmp_path / "metrics-1", "epoch,step,train/loss,val/geneval", "0,9,0.9,", "0,9,,0.5", "0,19,0.8,")
    write(tmp_path / "metrics-2", "epoch,step,train/loss", "0,19,0.7")
    write(tmp_path / "metrics", "epoch,step,train/loss,train/learning_rate", "0,29,0.6,0.001")
    assert read_metrics(tmp_path) == {
        "train/loss": [(9, 0.9), (19, 0.7), (29, 0.6)],
        "val/geneval": [(9, 0.5)],
        "train/learning_rate": [(29, 0.001)],
    }


def test_each_kind_of_curve_has_a_panel() -> None:
    names = [
        "train/loss", "train/token_loss", "val/loss", "val/geneval", "val/geneval/sample",
        "val/geneval/sample/counting", "train/learning_rate", "val/objects/sample",
    ]  # fmt: skip
    points = {name: [(0, 1.0), (10, 0.5)] for name in names}
    figure = curves_figure(points, "parm")
    assert figure is not None
    shown = {axes.get_title(loc="left"): [line.get_label() for line in axes.lines] for axes in figure.axes}
    assert shown == {
        "training loss": ["loss", "token_loss"],
        "validation loss": ["loss"],
        "GenEval on validation prompts": ["val/geneval, which is monitored", "sample"],
        "learning rate": ["learning_rate"],
    }


def test_many_points_are_smoothed_within_their_range() -> None:
    figure = curves_figure({"train/loss": [(i, float(i % 2)) for i in range(100)]}, "parm")
    assert figure is not None
    raw, smooth = figure.axes[0].lines
    assert len(smooth.get_ydata()) == 100 and max(smooth.get_ydata()) < 0.7 < max(raw.get_ydata())


def test_a_run_that_logged_nothing_has_no_curves(tmp_path: Path) -> None:
    assert read_metrics(tmp_path) == {} and curves_figure({"test/auc": [(0, 1.0)]}, "x") is None
