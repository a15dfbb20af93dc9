"""Settings of a served model: all faults are reported together."""

from __future__ import annotations

import pytest
from live_server import make_settings

from finlora.errors import ConfigError
from finlora.serve.settings import read_settings


def test_all_faults_are_reported_together():
    args = {
        "nmae": "x",
        "model": {"bits": 5},
        "stages": {"num": 0, "device": "tpu", "gpus": 0},
        "limits": {"max_new_tokens": 0, "deadline_s": -1},
        "max_adapters": 0,
    }
    with pytest.raises(ConfigError) as error:
        read_settings(args)
    text = str(error.value)
    for words in (
        "nmae is not a setting: did you mean name",
        "model.bits=5",
        "stages.device='tpu'",
        "stages.num=0: expected at least 1",
        "stages.gpus=0.0: expected more than 0; to serve without a GPU, set stages.device=cpu and leave this out",
        "limits.max_new_tokens=0",
        "limits.deadline_s=-1.0",
        "max_adapters=0",
    ):
        assert words in text


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"name": "a:b"}, "without colon, at sign, slash and space"),
        ({"name": ""}, "without colon"),
        ({"audit_texts": True}, "audit_texts=true without an audit log"),
        ({"limits": {"max_new_tokens": 8}}, "default_extract_tokens=48: expected at most limits.max_new_tokens=8"),
        ({"limits": {"max_new_tokens": 8}}, "default_new_tokens=256: expected at most limits.max_new_tokens=8"),
    ],
)
def test_conflicting_settings_are_refused(tmp_path, changes, words):
    with pytest.raises(ConfigError, match=words):
        make_settings(tmp_path, **changes)
