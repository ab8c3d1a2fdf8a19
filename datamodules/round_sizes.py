"""The check that minibatches divide a round of groups, which takes no torch."""


def refuse_uneven_round(images: int, batch_size: int, processes: int, inner_epochs: int, accumulated: int) -> None:
    """Raise ValueError if minibatches of `batch_size` a process, or updates of `accumulated`, do not divide a round."""
    together = batch_size * processes
    if images % together:
        ranks = f" on each of {processes} processes" if processes > 1 else ""
        raise ValueError(f"data.batch_size={batch_size}{ranks} does not divide the {images} images of a round")
    minibatches = images * inner_epochs // together
    if minibatches % accumulated:
        said = f"does not divide the {minibatches} minibatches of a round: an update would mix two policies' images"
        raise ValueError(f"trainer.accumulate_grad_batches={accumulated} {said}")
