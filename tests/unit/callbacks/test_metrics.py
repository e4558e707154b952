"""What RunMetrics counts, over one fit and over several."""

from lightning_dataflow.callbacks import RunMetrics
from tests.unit.strategies.fits import make_data, make_module, make_trainer


def test_a_second_fit_counts_from_zero(prompts, target, target_path, tmp_path):
    """The first fit pads its rows; the second has one sample a row, so no position is empty."""
    metrics = RunMetrics()
    for micro_batch_size, is_padded in ((4, True), (1, False)):
        data = make_data(prompts, target, micro_batch_size=micro_batch_size)
        make_trainer(tmp_path, data, 1, callbacks=[metrics]).fit(make_module(target_path), data)
        assert (metrics.rates(4)["padding_fraction"] > 0) == is_padded
