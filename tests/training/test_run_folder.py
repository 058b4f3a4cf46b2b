"""Directories of runs: always new, and the last one of a name is found."""

from __future__ import annotations

from pathlib import Path

from alfb_dist.config import load_config
from alfb_dist.training.run_folder import describe_run, last_run_folder, new_run_folder, write_config

TEST_CONFIG = Path(__file__).parents[2] / "configs" / "test.toml"


def test_a_second_run_gets_a_new_directory(tmp_path: Path) -> None:
    made = [new_run_folder(tmp_path / "runs", "demo") for _ in range(3)]
    assert [folder.name for folder in made] == ["demo", "demo-2", "demo-3"]


def test_the_last_run_of_a_name_is_found_by_number(tmp_path: Path) -> None:
    assert last_run_folder(tmp_path, "demo") is None
    for name in ("demo", "demo-2", "demo-10", "demo-9", "demo-extra", "other-11"):
        (tmp_path / name).mkdir()
    (tmp_path / "demo-12").write_text("a file is no run")
    found = last_run_folder(tmp_path, "demo")
    assert found is not None
    assert found.name == "demo-10"


def test_config_json_holds_configuration_hash_and_versions(tmp_path: Path) -> None:
    import json

    config = load_config(TEST_CONFIG)
    write_config(tmp_path, describe_run(config, world_size=2))
    read = json.loads((tmp_path / "config.json").read_text())
    assert read["config"]["parallel"]["ep_degree"] == 2
    assert read["config_hash"] == config.hash()
    assert {"python", "torch", "deepspeed", "transformers"} <= set(read["versions"])
    assert read["world_size"] == 2
    assert [f.name for f in tmp_path.iterdir()] == ["config.json"]
