"""What a hospital decides for itself, and how it hears of a mistake."""

from __future__ import annotations

import laws
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from client.policy import Policy, Releases
from client.site import FILE, SiteConfig
from shared_models.errors import FederadError

GOOD = 'name = "site-1"\ndata = "/data"\n'

folders = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=30).map("/data/{}".format)


class TestLoad:
    def test_file_is_read_with_its_default(self, tmp_path):
        """
        A site names itself and its data; the device is chosen for it unless it says otherwise.
        """
        (tmp_path / FILE).write_text(GOOD)

        assert SiteConfig.load(tmp_path) == SiteConfig(name="site-1", data="/data", device="auto")

    @pytest.mark.parametrize("device", ["auto", "cpu", "cuda", "cuda:1"])
    def test_devices_that_exist_are_taken(self, tmp_path, device):
        """
        The processor, a GPU, a certain GPU, or whichever there is.
        """
        (tmp_path / FILE).write_text(f'{GOOD}device = "{device}"\n')

        assert SiteConfig.load(tmp_path).device == device

    @pytest.mark.parametrize(
        ("text", "key"),
        [
            ('data = "/data"', "name"),
            ('name = "site-1"', "data"),
            ('name = "two words"\ndata = "/data"', "name"),
            ('name = "-dash"\ndata = "/data"', "name"),
            ('name = "../up"\ndata = "/data"', "name"),
            ('name = ""\ndata = "/data"', "name"),
            (f'name = "{"x" * 64}"\ndata = "/data"', "name"),
            ('name = 7\ndata = "/data"', "name"),
            ('name = "site-1"\ndata = 7', "data"),
            (f'{GOOD}device = "gpu"', "device"),
            (f"{GOOD}device = 0", "device"),
            (f'{GOOD}dvice = "cpu"', "dvice"),
        ],
    )
    def test_mistake_is_c146_with_its_key(self, tmp_path, text, key):
        """
        A key that is missing, unknown or impossible is named, with the file and the keys there are.
        """
        (tmp_path / FILE).write_text(text)

        with pytest.raises(FederadError) as error:
            SiteConfig.load(tmp_path)
        assert error.value.code == "C146"
        assert f": {key}: " in error.value.happened
        assert str(tmp_path / FILE) in error.value.happened
        assert "name, data, device" in error.value.remedies[1]

    @pytest.mark.parametrize(
        ("text", "key"),
        [
            ("epsilon = 1", "policy.epsilon"),
            ("lifetime_epsilon = 0", "policy.lifetime_epsilon"),
            ('run_epsilon = "8"', "policy.run_epsilon"),
            ("minimum_patients = 0", "policy.minimum_patients"),
            ("without_privacy = 1", "policy.without_privacy"),
            ('hours = "8-17"', "policy.hours"),
            ('hours = "24:00-06:00"', "policy.hours"),
            ('hours = "06:00-06:00"', "policy.hours"),
            ('releases.update = "encrypted"', "policy.releases.update"),
            ('releases.status = "noised"', "policy.releases.status"),
            ('releases.gradients = "allowed"', "policy.releases.gradients"),
        ],
    )
    def test_mistake_in_the_policy_is_c146_with_its_keys(self, tmp_path, text, key):
        """
        What the hospital permits is not guessed either: the key is named, and the keys of the policy are listed.
        """
        (tmp_path / FILE).write_text(f"{GOOD}[policy]\n{text}\n")

        with pytest.raises(FederadError) as error:
            SiteConfig.load(tmp_path)
        assert error.value.code == "C146"
        assert f": {key}: " in error.value.happened
        assert "lifetime_epsilon, run_epsilon" in error.value.remedies[1]

    @pytest.mark.parametrize("anchor", ["ledger.anchor", "../anchor", ""])
    def test_anchor_needs_an_absolute_path(self, tmp_path, anchor):
        """
        The second copy of the ledger lies where the hospital says, whatever folder a command is started in.
        """
        (tmp_path / FILE).write_text(f'{GOOD}anchor = "{anchor}"\n')

        with pytest.raises(FederadError, match="C146"):
            SiteConfig.load(tmp_path)

    @pytest.mark.parametrize(
        "content",
        [
            b"name = ",
            b"\xff\xfe",
            b"",
            b'name = "a"\nname = "b"',
            b'name = 2024-01-01\ndata = "/data"',
            b"name = " + b"[" * 20_000,
        ],
        ids=["half a line", "no text", "nothing", "a key twice", "a date", "brackets"],
    )
    def test_file_that_cannot_be_used_is_c146(self, tmp_path, content):
        """
        Whatever the file holds, its reader gets a numbered error and no traceback.
        """
        (tmp_path / FILE).write_bytes(content)

        with pytest.raises(FederadError, match="C146"):
            SiteConfig.load(tmp_path)

    def test_missing_file_and_folder_are_c146(self, tmp_path):
        """
        A station that was never set up is told so.
        """
        (tmp_path / "taken" / FILE).mkdir(parents=True)

        for folder in (tmp_path, tmp_path / "nowhere", tmp_path / "taken"):
            with pytest.raises(FederadError, match="C146"):
                SiteConfig.load(folder)


class TestSave:
    @laws.SAME_EXAMPLES
    @given(folders, st.sampled_from(["auto", "cpu", "cuda:3"]))
    def test_what_is_saved_is_loaded(self, tmp_path_factory, data, device):
        """
        Any folder name survives, with quotes, line breaks, umlauts and signs of any script.
        """
        folder = tmp_path_factory.mktemp("site")
        config = SiteConfig(name="site-1", data=data, device=device)
        config.save(folder)

        assert SiteConfig.load(folder) == config

    @pytest.mark.parametrize("data", ["/Träger/MR", 'a"b\\c', "two\nlines\ttabs", "/data/\U0001f9e0", "/data/\x7f"])
    def test_odd_folders_survive(self, tmp_path, data):
        """
        A few that were typed on purpose.
        """
        SiteConfig(name="site-1", data=data).save(tmp_path)

        assert SiteConfig.load(tmp_path).data == data


class TestPolicy:
    def test_nothing_said_is_the_careful_policy(self):
        """
        A hospital that says nothing has both caps, and trains nothing without privacy.
        """
        permits = SiteConfig(name="site-1", data="/data").permits

        assert permits == Policy()
        assert (permits.lifetime_epsilon, permits.run_epsilon) == (10.0, 8.0)
        assert not permits.without_privacy
        assert not permits.image_level

    def test_emulated_site_is_open_but_for_what_it_says(self):
        """
        A made-up hospital protects nobody: it has no caps, unless a simulation wants to see one reached.
        """
        config = SiteConfig(name="site-1", data="/data", emulated=True)
        capped = config.model_copy(update={"policy": Policy(lifetime_epsilon=3.0)})

        assert config.permits.without_privacy
        assert config.permits.lifetime_epsilon == config.permits.run_epsilon == float("inf")
        assert capped.permits.lifetime_epsilon == 3.0
        assert capped.permits.without_privacy

    def test_whole_policy_is_saved_and_loaded(self, tmp_path):
        """
        Every key survives, also an infinite cap and the table of releases.
        """
        policy = Policy(
            lifetime_epsilon=float("inf"),
            run_epsilon=3.5,
            minimum_patients=50,
            tasks=("segmentation", "classification"),
            hours="20:00-06:00",
            max_rounds=7,
            without_privacy=True,
            image_level=True,
            releases=Releases(update="noised", metric="forbidden", progress="forbidden"),
        )
        config = SiteConfig(name="site-1", data="/data", anchor="/mnt/other disk/anchor", emulated=True, policy=policy)
        config.save(tmp_path)

        assert SiteConfig.load(tmp_path) == config

    def test_saved_file_shows_what_could_be_said(self, tmp_path):
        """
        The administrator finds every key with its default and meaning, and taking the signs away changes nothing.
        """
        SiteConfig(name="site-1", data="/data").save(tmp_path)
        text = (tmp_path / FILE).read_text()
        (tmp_path / FILE).write_text(text.replace("\n#", "\n").replace("\n What", "\n# What"))

        assert all(f"#{key} = " in text for key in Policy.model_fields if key not in {"tasks", "releases"})
        assert SiteConfig.load(tmp_path).permits == Policy()

    def test_typed_policy_is_read(self, tmp_path):
        """
        As an administrator would write it.
        """
        (tmp_path / FILE).write_text(
            f'{GOOD}[policy]\nrun_epsilon = 4\nhours = "20:00-06:00"\ntasks = ["segmentation"]\n'
            '[policy.releases]\nmetric = "forbidden"\n'
        )
        permits = SiteConfig.load(tmp_path).permits

        assert (permits.run_epsilon, permits.lifetime_epsilon) == (4.0, 10.0)
        assert permits.tasks == ("segmentation",)
        assert permits.rule("metric", private=True) == "forbidden"


def test_configuration_is_frozen():
    """
    What the hospital decided cannot be changed while the station runs.
    """
    config = SiteConfig(name="site-1", data="/data")

    with pytest.raises(ValidationError, match="frozen"):
        config.device = "cpu"
