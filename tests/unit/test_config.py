"""config.py: defaults < file < command line, and errors that name the nearest right key."""

from __future__ import annotations

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from sceneray import config
from sceneray.config import RESUMABLE_WITH_OTHER, AugmentSettings, Settings, TrainSettings
from sceneray.errors import ConfigError

NEEDED = ["run=runs/x", "data.store=stores/x"]


def keys_of(cls: type[BaseModel], prefix: str = "") -> list[str]:
    """Every dotted key of a settings class that holds a value."""
    keys = []
    for name, field in cls.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            keys += keys_of(field.annotation, f"{prefix}{name}.")
        else:
            keys.append(prefix + name)
    return keys


def refusal(*overrides: str) -> str:
    """The message that TrainSettings refuses these overrides with."""
    with pytest.raises(ConfigError) as caught:
        config.load(TrainSettings, None, [*NEEDED, *overrides])
    return str(caught.value)


def test_the_command_line_beats_the_file_beats_the_default(tmp_path):
    """A value comes from the last place that names it; places that name a sibling leave it alone."""
    file = tmp_path / "x.yaml"
    file.write_text("run: from-file\ndata: {store: s}\nepochs: 7\noptimizer: {lr: 0.5, momentum: 0.1}\n")
    settings = config.load(TrainSettings, str(file), ["optimizer.lr=0.25", "seed=3"])
    assert (settings.run, settings.epochs, settings.seed) == ("from-file", 7, 3)
    assert (settings.optimizer.lr, settings.optimizer.momentum) == (0.25, 0.1)
    assert settings.optimizer.weight_decay == TrainSettings.model_fields["optimizer"].default.weight_decay


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("epochs=1e1", "epochs", 10.0),
        ("optimizer.lr=1e-3", "optimizer.lr", 1e-3),
        ("augment.crop=[96, 128]", "augment.crop", (96, 128)),
        ("model.weights=null", "model.weights", None),
        ("model.weights=s3://b/k?a=b", "model.weights", "s3://b/k?a=b"),
        ("resources.gpu=false", "resources.gpu", False),
        ("augment={flip: 0}", "augment.flip", 0.0),
    ],
)
def test_an_override_is_yaml(text, key, value):
    """The right side of the first equals sign is read as YAML, and the dotted key says where it goes."""
    found = config.load(TrainSettings, None, [*NEEDED, text])
    for name in key.split("."):
        found = getattr(found, name)
    assert found == value


def test_an_empty_group_in_a_file_takes_an_override(tmp_path):
    """A group whose lines are all commented out in the file can still be set on the command line."""
    file = tmp_path / "x.yaml"
    file.write_text("run: r\ndata: {store: s}\naugment:\n  # flip: 0.5\n")
    assert config.load(TrainSettings, str(file), ["augment.flip=0"]).augment.flip == 0


@pytest.mark.parametrize(
    ("override", "meant"),
    [
        ("optimzer.lr=1", "did you mean 'optimizer'?"),
        ("optimizer.momentun=1", "did you mean 'optimizer.momentum'?"),
        ("lr=0.1", "did you mean 'optimizer.lr'?"),
        ("batchsize=8", "did you mean 'batch_size'?"),
        ("model.crop=[1, 1]", "did you mean 'augment.crop'?"),
        ("schedule.qqqq=1", "known: name, power, warmup_steps"),
    ],
)
def test_an_unknown_key_names_the_nearest(override, meant):
    """An unknown key is refused with the key that was meant, or with the known ones."""
    message = refusal(override)
    assert f"unknown key '{override.split('=')[0].split('.')[0]}" in message
    assert meant in message


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("model.output_stride=4", "model.output_stride: Input should be 8 or 16, got 4"),
        ("epochs=fast", "epochs: Input should be a valid number"),
        ("epochs=.inf", "epochs: Input should be a finite number"),
        ("augment.flip=2", "augment.flip: Input should be less than or equal to 1, got 2"),
        ("augment.scale=[2, 1]", "augment.scale: scale must be [low, high] with 0 < low <= high, got [2.0, 1.0]"),
        ("data=3", "data: Input should be a valid dictionary"),
        ("batch_size=1", "batch_size (1) must be at least workers × accumulate (2 × 1 = 2)"),
        ("loss.name=cross_entrpy", "did you mean 'cross_entropy'?"),
        ("model.backbone=resnet19", "unknown backbone 'resnet19'"),
        ("epochs", "'epochs' is not a setting: write key=value"),
        ("=3", "'=3' is not a setting"),
        ("epochs=[", "the value of 'epochs' is not YAML"),
        ("epochs.x=3", "unknown key 'epochs"),
    ],
)
def test_a_wrong_value_says_the_rule_and_what_came(override, says):
    """A refused value names the key, the rule and the value, in one sentence."""
    if override == "epochs.x=3":
        with pytest.raises(ConfigError, match="'epochs' is a value, not a group"):
            config.load(TrainSettings, None, [*NEEDED, "epochs=1", override])
    else:
        assert says in refusal(override)


def test_every_problem_is_told_at_once():
    """Two wrong settings are both in the message."""
    message = refusal("epohcs=3", "seed=-1")
    assert "did you mean 'epochs'?" in message
    assert "seed: Input should be greater than or equal to 0, got -1" in message


def test_a_required_setting_says_how_to_give_it():
    """Without a store the message names the key to set, also where its whole group is missing."""
    with pytest.raises(ConfigError, match=r"'data' is required: set it in the file or with data\.store=VALUE"):
        config.load(TrainSettings, None, ["run=x"])
    with pytest.raises(ConfigError, match=r"'data\.store' is required: .* with data\.store=VALUE"):
        config.load(TrainSettings, None, ["run=x", "data.order=block"])


@pytest.mark.parametrize(
    ("text", "says"),
    [("- a\n- b\n", "must hold a mapping"), ("a: [", "is not YAML"), ("\xff", "is not YAML"), ("1: 2", "1: ")],
)
def test_a_broken_file_is_named(tmp_path, text, says):
    """A file that is no mapping of settings is refused with its path."""
    file = tmp_path / "broken.yaml"
    file.write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match=r"broken\.yaml") as caught:
        config.load(TrainSettings, str(file))
    assert says in str(caught.value)


def test_a_missing_file_and_a_folder_are_named(tmp_path):
    """A path with no file behind it, or with a folder, is refused with the path."""
    with pytest.raises(ConfigError, match=r"no settings file at .*none\.yaml"):
        config.read_yaml(str(tmp_path / "none.yaml"))
    with pytest.raises(ConfigError, match="is a folder"):
        config.read_yaml(str(tmp_path))


def test_an_empty_file_sets_nothing(tmp_path):
    """A file of comments alone is an empty mapping."""
    (tmp_path / "x.yaml").write_text("# nothing yet\n")
    assert config.read_yaml(str(tmp_path / "x.yaml")) == {}


def test_settings_cannot_be_changed():
    """Settings are values: assigning to a field raises."""
    settings = config.load(TrainSettings, None, NEEDED)
    with pytest.raises(ValueError, match="frozen"):
        settings.epochs = 3


@given(
    st.fixed_dictionaries(
        {
            "run": st.text(min_size=1),
            "data": st.fixed_dictionaries({"store": st.text(min_size=1), "window": st.integers(1, 10**6)}),
            "epochs": st.floats(1e-9, 1e6),
            "optimizer": st.fixed_dictionaries({"lr": st.floats(1e-12, 1e3), "momentum": st.floats(0, 0.99)}),
            "augment": st.fixed_dictionaries({"crop": st.lists(st.integers(1, 9999), min_size=2, max_size=2)}),
            "threads": st.none() | st.integers(1, 64),
        }
    )
)
def test_dump_and_load_round_trip(tree):
    """What `dump` writes reads back as equal settings, whatever the values are."""
    settings = config.validate(TrainSettings, tree, "a test")
    again = config.validate(TrainSettings, yaml.safe_load(config.dump(settings)), "a test")
    assert again == settings
    assert config.differences(settings, again) == []


def test_differences_name_what_changed():
    """Each changed setting is told with its old and new value; an ignored key hides all below it."""
    old = config.load(TrainSettings, None, NEEDED)
    new = config.load(TrainSettings, None, [*NEEDED, "optimizer.lr=0.5", "save.keep=9", "workers=3"])
    assert config.differences(old, new) == ["optimizer.lr: 0.01 → 0.5", "save.keep: 3 → 9", "workers: 2 → 3"]
    assert config.differences(old, new, ["save", "workers"]) == ["optimizer.lr: 0.01 → 0.5"]
    assert config.differences(old, new, ["optimizer.l", "sav"]) == config.differences(old, new)


def test_what_may_change_on_resume_exists():
    """Every key that a resumed run may change is a setting, or a group of them."""
    keys = keys_of(TrainSettings)
    for name in RESUMABLE_WITH_OTHER:
        assert any(key == name or key.startswith(name + ".") for key in keys), name


def test_a_registry_decides_the_allowed_names():
    """A validator made by `known_in` accepts what its dict holds and refuses other names with the nearest."""
    check = config.known_in("sceneray.optim:SCHEDULES")
    assert check("poly") == "poly"
    with pytest.raises(ValueError, match="unknown schedule 'pol': did you mean 'poly'"):
        check("pol")


def test_every_setting_forbids_unknown_keys_and_infinities():
    """All groups of the training settings derive from Settings, so none of them takes an unknown key."""
    for field in TrainSettings.model_fields.values():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            assert issubclass(field.annotation, Settings)
    with pytest.raises(ConfigError, match="finite"):
        config.validate(AugmentSettings, {"scale": [0.5, float("inf")]}, "a test")
