"""Small lists in the published formats, with the quirks that the real ones have."""

import json

import pytest

from data import ManifestError, lists

SIZES = {
    "audioset": 527,
    "audioset20k": 527,
    "audioset500k": 527,
    "vggsound": 309,
    "ucf101": 101,
    "kinetics400": 400,
    "ssv2": 174,
    "esc50": 50,
}


def read(dataset, folder, number=1):
    clips, names = lists.DATASETS[dataset].read(folder, number)
    return list(clips), names


def write(folder, **files):
    """Files of a folder by name, in which __ stands for the dot."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text, encoding="utf-8")
    return folder


@pytest.mark.parametrize("dataset", sorted(SIZES))
def test_every_class_has_one_name(dataset):
    names = lists.class_names(dataset)
    assert len(names) == len(set(names)) == SIZES[dataset]
    assert all(name == name.strip() != "" for name in names)


def test_class_names_are_in_the_published_order():
    names = lists.class_names("audioset")
    assert (names[0], names[137], names[526]) == ("Speech", "Music", "Field recording")
    for dataset in ("kinetics400", "ssv2", "vggsound"):
        assert lists.class_names(dataset) == sorted(lists.class_names(dataset))
    assert lists.class_names("ucf101")[36] == "HandstandPushups"
    assert lists.class_names("esc50")[49] == "hand_saw"
    heads = lists.class_names("epic-kitchens-100")
    assert {head: len(names) for head, names in heads.items()} == dict(
        verb=97, noun=300
    )
    assert (heads["verb"][7], heads["noun"][18]) == ("cut", "board:chopping")
    with pytest.raises(KeyError):
        lists.class_names("hmdb51")


# ---------------------------------------------------------------------------- AudioSet

BALANCED = """\
# Segments csv created Sun Mar  5 10:54:31 2017
# num_ytids=22160, num_segs=22160, num_unique_labels=527, num_positive_labels=52882
# YTID, start_seconds, end_seconds, positive_labels
--PJHxphWEs, 30.000, 40.000, "/m/09x0r,/t/dd00088"
-0RWZT-miFs, 420.000, 430.000, "/m/03v3yw,/m/0k4j"
"""
UNBALANCED = """\
# Segments csv created Sun Mar  5 10:54:25 2017
# num_ytids=2041789, num_segs=2041789, num_unique_labels=527, num_positive_labels=4020212
# YTID, start_seconds, end_seconds, positive_labels
---1_cCGK4M, 0.000, 10.000, "/m/01g50p,/m/0284vy3,/m/06d_3,/m/07jdr,/m/07rwm0c"
--2_BBVHAAA, 30.000, 31.250, "/m/09x0r"
"""  # noqa: E501
EVALUATION = """\
# Segments csv created Sun Mar  5 10:54:25 2017
# num_ytids=20371, num_segs=20371, num_unique_labels=527, num_positive_labels=51804
# YTID, start_seconds, end_seconds, positive_labels
--4gqARaEJE, 0.000, 10.000, "/m/068hy,/m/07q6cd_,/m/0bt9lr,/m/0jbk"
"""


@pytest.fixture
def audioset(tmp_path):
    return write(
        tmp_path / "audioset",
        balanced_train_segments__csv=BALANCED,
        unbalanced_train_segments__csv=UNBALANCED,
        eval_segments__csv=EVALUATION,
    )


def test_audioset(audioset):
    clips, names = read("audioset", audioset)
    assert [(clip.id, clip.split) for clip in clips] == [
        ("---1_cCGK4M_000000", "train"),
        ("--2_BBVHAAA_000030", "train"),
        ("--PJHxphWEs_000030", "train"),
        ("-0RWZT-miFs_000420", "train"),
        ("--4gqARaEJE_000000", "test"),
    ]
    assert clips[2] == lists.Clip(
        *("--PJHxphWEs_000030", "train", ("Speech", "Gush"), "--PJHxphWEs"),
        *(30.0, 40.0),
    )
    assert clips[4].labels == ("Domestic animals, pets", "Squeak", "Dog", "Animal")
    assert clips[1].end == 31.25 and len(names) == 527


def test_audioset_20k_and_one_list_alone(audioset):
    clips, _ = read("audioset20k", audioset)
    assert [clip.split for clip in clips] == ["train", "train", "test"]
    clips, _ = read("audioset", audioset / "eval_segments.csv")
    assert [clip.id for clip in clips] == ["--4gqARaEJE_000000"]
    assert clips[0].split == "test"


def test_a_balanced_list_of_500k_with_or_without_times(audioset):
    path = audioset / "balanced_500k.csv"
    path.write_text(UNBALANCED)
    clips, _ = read("audioset500k", audioset)
    assert [clip.split for clip in clips] == ["train", "train", "test"]
    path.write_text("-0RWZT-miFs.mp4\n--2_BBVHAAA\n")
    only_ids, _ = read("audioset500k", audioset)
    known = {clip.id: clip for clip in read("audioset", audioset)[0]}
    assert only_ids == [
        known[id]
        for id in ("-0RWZT-miFs_000420", "--2_BBVHAAA_000030", "--4gqARaEJE_000000")
    ]
    path.write_text("unknownvide\n")
    with pytest.raises(ManifestError, match="500k.csv: 1 ids, such as unknownvide"):
        read("audioset500k", audioset)


def test_audioset_with_its_own_list_of_classes(audioset):
    write(
        audioset,
        class_labels_indices__csv="index,mid,display_name\n"
        '0,/m/09x0r,"Speech"\n1,/t/dd00088,"Gush"\n2,/m/03v3yw,"Keys jangling"\n'
        '3,/m/0k4j,"Car"\n4,/m/068hy,"Domestic animals, pets"\n5,/m/07q6cd_,"Squeak"\n'
        '6,/m/0bt9lr,"Dog"\n7,/m/0jbk,"Animal"\n',
    )
    clips, names = read("audioset20k", audioset)
    assert names[4] == "Domestic animals, pets" and len(names) == 8
    assert clips[1].labels == ("Keys jangling", "Car")
    with pytest.raises(ManifestError, match="line 4: '/m/01g50p' is no class"):
        read("audioset", audioset)


# --------------------------------------------------------------------------- the others


def test_vggsound(tmp_path):
    write(
        tmp_path,
        vggsound__csv="---g-f_I2yQ,1,people marching,test\n"
        '--0PQM4-hqg,30,"vehicle horn, car horn, honking",train\n',
    )
    clips, names = read("vggsound", tmp_path)
    assert clips == [
        lists.Clip(
            *("---g-f_I2yQ_000001", "test", ("people marching",), "---g-f_I2yQ"),
            *(1.0, 11.0),
        ),
        lists.Clip(
            *("--0PQM4-hqg_000030", "train", ("vehicle horn, car horn, honking",)),
            *("--0PQM4-hqg", 30.0, 40.0),
        ),
    ]
    assert len(names) == 309
    assert read("vggsound", tmp_path / "vggsound.csv")[0] == clips


@pytest.mark.parametrize("number", [1, 2, 3])
def test_ucf101(tmp_path, number):
    write(
        tmp_path / "ucfTrainTestlist",
        classInd__txt="1 ApplyEyeMakeup\r\n2 ApplyLipstick\r\n3 HandstandPushups\r\n",
        **{
            f"trainlist0{n}__txt": "ApplyEyeMakeup/"
            f"v_ApplyEyeMakeup_g08_c0{n}.avi 1\r\n"
            f"HandstandPushups/v_HandStandPushups_g08_c0{n}.avi 3\r\n"
            for n in (1, 2, 3)
        },
        **{
            f"testlist0{n}__txt": f"ApplyLipstick/v_ApplyLipstick_g01_c0{n}.avi\r\n"
            for n in (1, 2, 3)
        },
    )
    clips, names = read("ucf101", tmp_path, number)
    assert names == ["ApplyEyeMakeup", "ApplyLipstick", "HandstandPushups"]
    assert [(clip.id, clip.split, clip.labels) for clip in clips] == [
        (f"ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c0{number}", "train", (names[0],)),
        (f"HandstandPushups/v_HandStandPushups_g08_c0{number}", "train", (names[2],)),
        (f"ApplyLipstick/v_ApplyLipstick_g01_c0{number}", "test", (names[1],)),
    ]


def test_kinetics400(tmp_path):
    header = "label,youtube_id,time_start,time_end,split,is_cc\n"
    write(
        tmp_path,
        train__csv=header + "testifying,---QUuC4vJs,84,94,train,0\n"
        '"massaging person\'s head",--3ouPhoy2A,20,30,train,0\n',
        val__csv=header.replace(",is_cc", "")
        + "petting_animal_(not_cat),-abc,0,10,val",
        test__csv="youtube_id,time_start,time_end,split\n--0edUL8zmA,92,102,test\n",
    )
    clips, names = read("kinetics400", tmp_path)
    assert [(clip.id, clip.split, clip.labels) for clip in clips] == [
        ("---QUuC4vJs_000084_000094", "train", ("testifying",)),
        ("--3ouPhoy2A_000020_000030", "train", ("massaging person's head",)),
        ("-abc_000000_000010", "validation", ("petting animal (not cat)",)),
    ]
    assert len(names) == 400


def test_ssv2(tmp_path):
    entry = dict(
        id="78687",
        label="holding potato next to vicks vaporub bottle",
        template="Holding [something] next to [something]",
        placeholders=["potato", "vicks vaporub bottle"],
    )
    write(
        tmp_path,
        **{
            "something-something-v2-train__json": json.dumps([entry]),
            "something-something-v2-validation__json": json.dumps(
                [dict(entry, id="4")]
            ),
            "something-something-v2-test__json": json.dumps([dict(id="1420")]),
        },
    )
    clips, names = read("ssv2", tmp_path)
    assert [(clip.id, clip.split) for clip in clips] == [
        ("78687", "train"),
        ("4", "validation"),
    ]
    assert clips[0].labels == ("Holding something next to something",)
    own = {"Opening something": "1", "Holding something next to something": "0"}
    write(tmp_path, labels__json=json.dumps(own))
    assert read("ssv2", tmp_path)[1] == list(own)[::-1]
    write(tmp_path, labels__json='{"Opening something": "0"}')
    with pytest.raises(ManifestError, match="train.json, line entry 1: 'Holding"):
        read("ssv2", tmp_path)


def test_epic_kitchens_100(tmp_path):
    header = (
        "narration_id,participant_id,video_id,narration_timestamp,start_timestamp,"
        "stop_timestamp,start_frame,stop_frame,narration,verb,verb_class,noun,"
        "noun_class,all_nouns,all_noun_classes\n"
    )
    line = (
        "{},P01,P01_01,00:00:01.089,{},{},8,202,open door,open,3,door,3,['door'],[3]\n"
    )
    write(
        tmp_path,
        EPIC_100_train__csv=header
        + line.format("P01_01_0", "00:00:00.14", "00:00:03.37"),
        EPIC_100_validation__csv=header
        + line.format("P01_01_9", "01:02:03.50", "01:02:04.00"),
        EPIC_100_test_timestamps__csv="narration_id\nP01_02_0\n",
    )
    clips, names = read("epic-kitchens-100", tmp_path)
    assert clips == [
        lists.Clip("P01_01_0", "train", ("open", "cupboard"), "P01_01", 0.14, 3.37),
        lists.Clip(
            *("P01_01_9", "validation", ("open", "cupboard"), "P01_01"), 3723.5, 3724.0
        ),
    ]
    assert list(names) == ["verb", "noun"]
    bad = header + line.format("x", "0", "1").replace(",open,3,", ",open,97,")
    write(tmp_path, EPIC_100_train__csv=bad)
    with pytest.raises(ManifestError, match="line 2: there is no class '97', only"):
        read("epic-kitchens-100", tmp_path)


@pytest.mark.parametrize("fold", [1, 5])
def test_esc50(tmp_path, fold):
    write(
        tmp_path,
        esc50__csv="filename,fold,target,category,esc10,src_file,take\n"
        "1-100032-A-0.wav,1,0,dog,True,100032,A\n"
        "5-9032-A-0.wav,5,0,dog,True,9032,A\n",
    )
    clips, names = read("esc50", tmp_path, fold)
    splits = {1: ["test", "train"], 5: ["train", "test"]}[fold]
    assert [(clip.id, clip.split) for clip in clips] == list(
        zip(["1-100032-A-0", "5-9032-A-0"], splits, strict=True)
    )
    assert clips[0].labels == ("dog",) and len(names) == 50


@pytest.mark.parametrize(
    "dataset, files, words",
    [
        ("audioset", {}, "holds none of unbalanced_train_segments.csv, balanced"),
        ("vggsound", {}, "holds no vggsound.csv"),
        ("vggsound", dict(vggsound__csv="a,1,hail\n"), "line 1: has 3 fields, not 4"),
        ("vggsound", dict(vggsound__csv="a,x,hail,train\n"), "line 1: 'x' is no time"),
        (
            "vggsound",
            dict(vggsound__csv="a,1,hails,train\n"),
            "line 1: 'hails' is no",
        ),
        ("vggsound", dict(vggsound__csv="a,1,hail,dev\n"), "line 1: 'dev' is no split"),
        ("vggsound", dict(vggsound__csv='a,1,"ha\n'), "line 1: has 3 fields"),
        ("ucf101", {}, "holds no trainlist01.txt"),
        (
            "ucf101",
            dict(trainlist01__txt="a.avi 1\n", testlist01__txt=""),
            "trainlist01.txt, line 1: 'a.avi 1' names no clip",
        ),
        ("kinetics400", {}, "holds no train.csv, val.csv or test.csv"),
        ("ssv2", {}, "holds no something-something-v2-train.json"),
        (
            "ssv2",
            dict(train__json="[{]", validation__json="[]"),
            "train.json: is not JSON",
        ),
        (
            "ssv2",
            dict(train__json='[{"id": "1"}]', validation__json="[]"),
            "train.json, entry 1: has no id or no template",
        ),
        ("epic-kitchens-100", {}, "holds neither EPIC_100_train.csv nor"),
        (
            "esc50",
            dict(esc50__csv="filename,fold\na.wav,1\n"),
            "line 2: has no cat",
        ),
    ],
)
def test_mistakes_in_lists_are_named(tmp_path, dataset, files, words):
    with pytest.raises(ManifestError, match=words):
        read(dataset, write(tmp_path / "lists", **files))
