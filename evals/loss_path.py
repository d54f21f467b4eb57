"""Plot of the loss along the straight line between two checkpoints."""

from typing import Any

from nmm_serve.evals.plots import Drawing, colour, drawing, legend_above


def loss_path(record: dict[str, Any]) -> Drawing:
    """Loss against the place on the path, for each validation source and their mean, with the chord of the mean."""
    t = [point["t"] for point in record["points"]]
    names = [name for name in record["points"][0]["losses"] if name != "loss_avg"]
    if len(names) > 1:
        names.append("loss_avg")
    with drawing("loss-path", 6.4, 3.8) as (drawn, axes):
        for index, name in enumerate(names):
            losses = [point["losses"][name] for point in record["points"]]
            mean = name == "loss_avg"
            label = "mean" if mean else name.removeprefix("loss_")
            axes.plot(
                t, losses, "o-", ms=4, lw=2.2 if mean else 1.3, color="#111" if mean else colour(index), label=label
            )
            axes.plot([t[0], t[-1]], [losses[0], losses[-1]], ":", lw=1, color="#111" if mean else colour(index))
        axes.set_xlabel("t, where weights = (1 - t) A + t B")
        axes.set_ylabel("validation loss, nats a token")
        legend_above(drawn, axes)
    return drawn
