"""One Mooncake for all store tests, and one store a variant: a connection takes a second to close."""

from collections.abc import Callable, Iterator

import pytest

from lightning_dataflow.services.mooncake import LocalMooncake
from lightning_dataflow.stores import MooncakeFeatureStore


@pytest.fixture(scope="session")
def mooncake(tmp_path_factory) -> Iterator[LocalMooncake]:
    with LocalMooncake(capacity_bytes=64 << 20, log_dir=tmp_path_factory.mktemp("mooncake")) as running:
        yield running


def attach(mooncake: LocalMooncake, store_id: str, **options) -> MooncakeFeatureStore:
    """A shared-memory client, unless `client_address=None`."""
    places = {name: getattr(mooncake, name) for name in ("master_address", "client_address", "metrics_address")}
    return MooncakeFeatureStore(store_id, **places | options)


VARIANTS = {
    "mooncake": {},
    "mooncake-tcp": {"client_address": None},
    "mooncake-blob": {"zero_copy": False},
}


@pytest.fixture(scope="session")
def mooncake_stores(mooncake) -> Iterator[Callable[[str], MooncakeFeatureStore]]:
    stores: dict[str, MooncakeFeatureStore] = {}

    def store(variant: str) -> MooncakeFeatureStore:
        if variant not in stores:
            stores[variant] = attach(mooncake, f"contract.{variant}", **VARIANTS[variant])
        return stores[variant]

    yield store
    for each in stores.values():
        each.close()
