"""Seccomp profiles: what is read, what is refused and how, and that refusing is all that happens."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from environment import DATA
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from isojob.errors import ProfileError
from isojob.seccomp import SeccompProfile


@pytest.fixture(params=["docker", "podman"])
def published(request: pytest.FixtureRequest) -> Path:
    return DATA / f"{request.param}-default-seccomp.json"


def document(*rules: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"defaultAction": "SCMP_ACT_ERRNO", "syscalls": [rule("execve"), *rules], **more}


def load(folder: Path, content: object) -> SeccompProfile:
    path = folder / "mine.json"
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return SeccompProfile.load(path)


def rule(*names: str, action: str = "SCMP_ACT_ALLOW", **more: Any) -> dict[str, Any]:
    return {"names": list(names), "action": action, **more}


def test_published_profiles_load(published: Path) -> None:
    """Docker's and Podman's defaults load as they are published, and can be loaded early."""
    profile = SeccompProfile.load(published)
    assert profile.name == published.name
    compiled = profile.compile()
    assert compiled.preload
    assert not compiled.notify


def test_oci_configuration(tmp_path: Path) -> None:
    """Out of a whole OCI config.json, the seccomp object is taken."""
    plain = load(tmp_path, document())
    assert load(tmp_path, {"ociVersion": "1.2.0", "linux": {"seccomp": document()}}) == plain


@pytest.mark.parametrize("content", [{"linux": {}}, {"linux": {"seccomp": None}}, [], 3, None, "x"])
def test_no_profile_inside(tmp_path: Path, content: object) -> None:
    """JSON without a profile in it is refused, not taken for an empty one."""
    with pytest.raises(ProfileError, match=r"mine\.json"):
        load(tmp_path, content)


def test_equal_by_content(tmp_path: Path) -> None:
    """Two profiles read from the same text are equal and hash alike; another rule is another."""
    one, two = load(tmp_path, document()), load(tmp_path, document())
    assert one == two
    assert hash(one) == hash(two)
    assert one != load(tmp_path, document(rule("read")))
    assert one.compile() is two.compile()


def test_shipped_profiles_are_named() -> None:
    """What comes with isojob goes by its short name, and is one object however often asked for."""
    assert SeccompProfile.default().name == "default"
    assert SeccompProfile.compute().name == "compute"
    assert SeccompProfile.unconfined().name == "unconfined"
    assert SeccompProfile.default() is SeccompProfile.default()
    assert SeccompProfile.unconfined() == SeccompProfile.unconfined()


@pytest.mark.parametrize("name", ["default", "compute", "unconfined"])
def test_round_trip(name: str) -> None:
    """A profile survives JSON and pickling, as a part of a sandbox that is sent elsewhere."""
    profile: SeccompProfile = getattr(SeccompProfile, name)()
    assert SeccompProfile.model_validate_json(profile.model_dump_json()) == profile
    assert SeccompProfile.model_validate_json(profile.model_dump_json(by_alias=True)) == profile
    assert pickle.loads(pickle.dumps(profile)) == profile


def test_frozen() -> None:
    """A profile cannot be changed under those who hold it."""
    with pytest.raises(ValidationError, match="frozen"):
        SeccompProfile.default().name = "other"  # type: ignore[misc]


def test_spellings_of_one_rule(tmp_path: Path) -> None:
    """Null lists, one name, errors by name and empty conditions are other spellings of one rule."""
    plain = load(tmp_path, document(rule("read", action="SCMP_ACT_ERRNO", errnoRet=22)))
    odd: dict[str, Any] = {
        "name": "read",
        "action": "SCMP_ACT_ERRNO",
        "errno": "EINVAL",
        "args": None,
        "comment": None,
        "includes": {},
        "excludes": None,
    }
    more = {"architectures": None, "archMap": None, "flags": None, "defaultErrno": ""}
    assert load(tmp_path, document(odd, **more)) == plain


def test_known_flags_are_accepted(tmp_path: Path) -> None:
    """The flags of the OCI's list load; any other is refused."""
    names = ["TSYNC", "LOG", "SPEC_ALLOW", "WAIT_KILLABLE_RECV"]
    load(tmp_path, document(flags=[f"SECCOMP_FILTER_FLAG_{name}" for name in names]))
    with pytest.raises(ProfileError, match="flags"):
        load(tmp_path, document(flags=["SECCOMP_FILTER_FLAG_NEW_LISTENER"]))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (rule("read", action="SCMP_ACT_TRACE"), "no tracer"),
        (rule("read", action="SCMP_ACT_NOTIFY"), "listener"),
        (rule("read", action="SCMP_ACT_PERMIT"), "action"),
        (rule("read", action="ALLOW"), "action"),
        (rule("read", errnoRet=1), "errnoRet"),
        (rule("read", action="SCMP_ACT_ERRNO", errnoRet=4096), "errnoRet"),
        (rule("read", action="SCMP_ACT_ERRNO", errnoRet=-1), "errnoRet"),
        (rule("read", action="SCMP_ACT_ERRNO", errnoRet=True), "errnoRet"),
        (rule("read", action="SCMP_ACT_ERRNO", errno="EWHAT"), "EWHAT"),
        (rule("read", action="SCMP_ACT_ERRNO", errno="EIO", errnoRet=1), "EIO"),
        (rule("read", args=[{"index": 6, "value": 0, "op": "SCMP_CMP_EQ"}]), r"args\.0\.index"),
        (rule("read", args=[{"index": -1, "value": 0, "op": "SCMP_CMP_EQ"}]), r"args\.0\.index"),
        (rule("read", args=[{"index": 0, "value": 2**64, "op": "SCMP_CMP_EQ"}]), "value"),
        (rule("read", args=[{"index": 0, "value": -1, "op": "SCMP_CMP_EQ"}]), "value"),
        (rule("read", args=[{"index": 0, "value": "1", "op": "SCMP_CMP_EQ"}]), "value"),
        (rule("read", args=[{"index": 0, "value": 1.5, "op": "SCMP_CMP_EQ"}]), "value"),
        (rule("read", args=[{"index": 0, "value": 1, "op": "SCMP_CMP_XOR"}]), "op"),
        (rule("read", args=[{"index": 0, "value": 1}]), "op"),
        (rule("read", args={}), "args"),
        (rule("read", name="write"), "either name or names"),
        (rule("read", "wri\0te"), "names"),
        (rule("read", includes={"arches": ["amd46"]}), "amd46"),
        (rule("read", includes={"caps": ["SYS_ADMIN"]}), "caps"),
        (rule("read", excludes={"minKernel": "four"}), "minKernel"),
        (rule("read", priority=3), "priority"),
    ],
)
def test_refusals_name_rule_and_call(tmp_path: Path, bad: dict[str, Any], message: str) -> None:
    """A refused rule is named by profile, place and system call, with what is wrong with it."""
    with pytest.raises(ProfileError, match=message) as caught:
        load(tmp_path, document(bad))
    assert "'mine.json': rule 1 (read" in str(caught.value)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"defaultAction": "SCMP_ACT_NOTIFY"}, "listener"),
        ({"defaultAction": "SCMP_ACT_TRACE"}, "tracer"),
        ({"defaultAction": "SCMP_ACT_ALLOW", "defaultErrnoRet": 1}, "defaultErrnoRet"),
        ({"syscalls": []}, "defaultAction"),
        (document(listenerPath="/run/x"), "listenerPath"),
        (document(architectures=["SCMP_ARCH_Z80"]), "architectures"),
        (
            document(
                architectures=["SCMP_ARCH_X86"], archMap=[{"architecture": "SCMP_ARCH_X86_64"}]
            ),
            "either architectures or archMap",
        ),
        (document(rule()), "names"),
        (document(extra=1), "extra"),
        (document(name="default"), "name"),
        (b'{"defaultAction": "SCMP_ACT_ERRNO", "defaultAction": "SCMP_ACT_ALLOW"}', "twice"),
        (b'{"defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": NaN}', "NaN"),
        (b"", "JSON"),
        (b"\xff\xfe\x00", "JSON"),
        (b"[" * 100_000, "JSON"),
        (b"1" * 5_000, "JSON"),
        (b" " * (2**20 + 1), "longer"),
    ],
)
def test_other_refusals_name_the_profile(tmp_path: Path, bad: object, message: str) -> None:
    """What is wrong outside of a rule is refused with the profile's name and the key."""
    with pytest.raises(ProfileError, match=message) as caught:
        load(tmp_path, bad)
    assert "'mine.json'" in str(caught.value)


def test_unreadable_file_is_an_os_error(tmp_path: Path) -> None:
    """A missing file is the caller's mistake, not the profile's."""
    with pytest.raises(FileNotFoundError):
        SeccompProfile.load(tmp_path / "absent.json")


def test_nothing_could_start(tmp_path: Path) -> None:
    """A profile under which no program starts is refused when it is compiled."""
    profile = load(tmp_path, {"defaultAction": "SCMP_ACT_ERRNO", "syscalls": [rule("read")]})
    with pytest.raises(ProfileError, match=r"mine\.json.*execve"):
        profile.compile()


def test_unknown_call(tmp_path: Path) -> None:
    """An allowed call that nobody knows stays denied and is told; a denied one is an error."""
    profile = load(tmp_path, document(rule("flibber", "read")))
    assert profile.compile().unresolved == ("flibber",)
    profile = load(tmp_path, document(rule("read", "flibber", action="SCMP_ACT_KILL_PROCESS")))
    with pytest.raises(ProfileError, match=r"'mine\.json': rule 1: flibber"):
        profile.compile()
    open_profile = {"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [rule("flibber")]}
    open_profile["syscalls"][0]["action"] = "SCMP_ACT_ERRNO"  # type: ignore[index]
    with pytest.raises(ProfileError, match=r"'mine\.json': rule 0: flibber"):
        load(tmp_path, open_profile).compile()


@pytest.mark.parametrize("action", ["SCMP_ACT_ALLOW", "SCMP_ACT_KILL"])
def test_call_of_another_architecture(tmp_path: Path, action: str) -> None:
    """Names that only other architectures have are no mistake and change nothing here."""
    plain = load(tmp_path, document()).compile("x86_64")
    foreign = document(rule("arm_fadvise64_64", "riscv_hwprobe", "socketcall", action=action))
    assert load(tmp_path, foreign).compile("x86_64") == plain


@pytest.mark.parametrize("op", ["LT", "LE", "GT", "GE"])
def test_order_beyond_the_width(tmp_path: Path, op: str) -> None:
    """A 32-bit argument cannot be less or greater than a larger number; -1 extended can stay."""

    def compiled(value: int, index: int, name: str) -> bytes:
        args = [{"index": index, "value": value, "op": f"SCMP_CMP_{op}"}]
        return load(tmp_path, document(rule(name, args=args))).compile().bpf

    with pytest.raises(ProfileError, match=r"rule 1: kill: argument 0 has 32 bits"):
        compiled(2**32, 0, "kill")
    assert compiled(2**64 - 5, 0, "kill") == compiled(2**32 - 5, 0, "kill")
    assert compiled(2**32, 1, "lseek") != compiled(0, 1, "lseek")


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**65), 2**65)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["SCMP_ACT_ALLOW", "SCMP_ACT_ERRNO", "SCMP_CMP_EQ", "read", "EPERM", "4.8"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [
                    *(
                        "defaultAction",
                        "syscalls",
                        "names",
                        "name",
                        "action",
                        "args",
                        "index",
                        "value",
                    ),
                    *(
                        "op",
                        "errnoRet",
                        "errno",
                        "includes",
                        "excludes",
                        "caps",
                        "arches",
                        "minKernel",
                    ),
                    *("defaultErrno", "defaultErrnoRet", "archMap", "flags", "linux", "seccomp"),
                ]
            ),
            inner,
            max_size=5,
        )
    ),
    max_leaves=12,
)


@st.composite
def mutilated(draw: st.DrawFn) -> object:
    """A good profile with one value anywhere in it replaced."""
    good: Any = document(
        rule("socket", args=[{"index": 0, "value": 1, "valueTwo": 0, "op": "SCMP_CMP_EQ"}]),
        rule("read", action="SCMP_ACT_ERRNO", errnoRet=1, includes={"minKernel": "4.8"}),
        archMap=[{"architecture": "SCMP_ARCH_X86_64", "subArchitectures": ["SCMP_ARCH_X86"]}],
    )
    at = good
    while True:
        key = draw(st.sampled_from(sorted(at) if isinstance(at, dict) else range(len(at))))
        if not isinstance(at[key], (dict, list)) or not at[key] or draw(st.booleans()):
            at[key] = draw(JSON)
            return good
        at = at[key]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("profiles")


def outcome(folder: Path, content: object) -> str:
    """The name of what was loaded and compiled, or the text of its refusal."""
    try:
        profile = load(folder, content)
        profile.compile()
    except ProfileError as error:
        return str(error)
    return profile.name


@settings(max_examples=300, deadline=None)
@given(content=mutilated() | JSON)
def test_malformed_json_is_a_profile_error(folder: Path, content: object) -> None:
    """Whatever JSON says, it is a profile that compiles, or a ProfileError, and nothing else."""
    assert "mine.json" in outcome(folder, content)


@settings(max_examples=200, deadline=None)
@given(
    at=st.integers(0, 10_000),
    noise=st.binary(max_size=4),
    length=st.integers(0, 8),
)
def test_damaged_text_is_a_profile_error(folder: Path, at: int, noise: bytes, length: int) -> None:
    """Bytes changed anywhere in a profile's file give a profile or a ProfileError."""
    text = json.dumps(document(rule("read", "write"))).encode()
    at %= len(text)
    assert "mine.json" in outcome(folder, text[:at] + noise + text[at + length :])
