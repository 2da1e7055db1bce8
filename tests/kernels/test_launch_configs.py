"""Launch configurations: which file serves a chip, and that graphs compiled with others are not taken from disk."""

import shutil

import pytest
import torch

from kernels import launch_configs
from kernels.dispatch import CHIPS


@pytest.mark.parametrize(
    "target, file",
    [
        ("cuda:90", "cuda:90"),
        ("cuda:89", "cuda:86"),
        ("cuda:75", "cuda:80"),
        ("hip:gfx90a", "hip:gfx942"),
        ("cpu", "cpu"),
    ],
)
def test_a_chip_without_a_file_takes_its_nearest_elders_or_the_oldest(target, file):
    """Never one of a newer chip, which may ask for what it has not."""
    assert launch_configs.config_target(CHIPS[target]) == file


def test_compiled_graphs_are_told_apart_by_the_launch_configurations_they_were_made_with(monkeypatch, tmp_path):
    before = torch.compiler.config.cache_key_tag
    shutil.copytree(launch_configs.CONFIGS, tmp_path, dirs_exist_ok=True)
    monkeypatch.setattr(launch_configs, "CONFIGS", tmp_path)
    try:
        table, tags = launch_configs.config_table("cuda:86"), []
        for added in ({}, {"some_kernel": {"64": {"num_warps": 4}}}, {}):
            launch_configs.write_config_table("cuda:86", table | added)
            tags.append(torch.compiler.config.cache_key_tag)
    finally:
        torch.compiler.config.cache_key_tag = before
        launch_configs.config_table.cache_clear()
        launch_configs.config_target.cache_clear()
    assert before and tags[0] == tags[2] != tags[1]
