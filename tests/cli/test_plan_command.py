import re

import pytest

from grok1.host import memory
from grok1.plan.devices import DEVICE_KINDS

JSON_KEYS = {
    "model",
    "parameters",
    "active_parameters",
    "context",
    "device",
    "count",
    "memory_bytes",
    "usable_bytes",
    "bandwidth_bytes_per_second",
    "flops_per_second",
    "mesh",
    "hosts",
    "host_of_shards",
    "idle_devices",
    "crossing_bytes_per_token",
    "replicated_weight_bytes",
    "dtype",
    "weight_bytes",
    "cache_bytes_per_sequence",
    "workspace_bytes",
    "needed_bytes",
    "fits",
    "sequences",
    "decode_tokens_per_second",
    "decode_tokens_per_second_full_context",
    "largest_batch",
    "largest_batch_tokens_per_second",
    "largest_batch_tokens_per_second_full_context",
    "prefill_tokens",
    "prefill_tokens_per_second",
    "alternative",
    "compiled",
    "verdict",
}


def planned(grok1, *arguments):
    result = grok1("plan", "--json", *arguments)
    assert (result.code, result.err) == (0, "")
    (fields,) = result.lines
    assert fields.keys() == JSON_KEYS
    return fields


def test_plan_as_text(grok1):
    result = grok1("plan", "--device", "h100-80gb", "--count", "8")
    assert (result.code, result.err) == (0, "")
    head, table, last = result.out.split("\n\n")
    assert head == "grok-1: 315,684,820,992 parameters, 83,756,587,008 active per token"
    rows = dict(line.rstrip().rsplit("  ", 1) for line in table.splitlines())
    rows = {label.strip(): value for label, value in rows.items()}
    assert rows["devices"] == "8 x h100-80gb"
    assert rows["weights per device"] == "39.6 GB"
    assert rows["KV cache per device, 8192 tokens"] == "268 MB"
    assert rows["maximum decode speed, 1 sequence"] == "316 tokens/s"
    assert last.startswith("fits: ")


def test_plan_that_does_not_fit_shows_one_that_does(grok1):
    fields = planned(grok1, "--device", "h100-80gb", "--count", "4")
    assert fields["fits"] is False
    assert fields["sequences"] == 0
    assert fields["alternative"]["mesh"] == [1, 8]
    assert fields["alternative"]["fits"] is True
    text = grok1("plan", "--device", "h100-80gb", "--count", "4").out
    assert "4 x h100-80gb           8 x h100-80gb\n" in text
    assert text.splitlines()[-1] == fields["verdict"]


@pytest.mark.parametrize("device", DEVICE_KINDS)
def test_plan_for_every_device_type(device, grok1):
    fields = planned(grok1, "--device", device, "--memory", "500GB")
    assert fields["count"] == 1
    assert fields["fits"] is True
    assert fields["decode_tokens_per_second"] > 0


def test_default_count_is_the_fewest_that_fit(grok1):
    assert planned(grok1, "--device", "h200")["count"] == 4
    assert planned(grok1, "--device", "h200", "--dtype", "float32", "--mesh", "2,8")["count"] == 16


def test_plan_for_present_devices(grok1, monkeypatch):
    monkeypatch.setattr(memory, "available_bytes", lambda: 10**9)
    fields = planned(grok1, "--preset", "tiny", "--mesh", "1,1")
    assert (fields["device"], fields["count"], fields["usable_bytes"]) == ("cpu", 16, 10**9)
    assert fields["fits"] is True
    assert planned(grok1)["fits"] is False


def test_bandwidth_and_dtype_options(grok1):
    common = ["--device", "cpu", "--memory", "512GB"]
    slow, fast = (planned(grok1, *common, "--bandwidth", given) for given in ("100GB", "200GB"))
    ratio = fast["decode_tokens_per_second"] / slow["decode_tokens_per_second"]
    assert ratio == pytest.approx(2)
    narrow = planned(grok1, *common, "--dtype", "bfloat16")
    assert narrow["cache_bytes_per_sequence"] * 2 == slow["cache_bytes_per_sequence"]


def test_compile_adds_the_memory_use_reported_by_the_compiler(grok1):
    options = ["--preset", "tiny", "--device", "h200", "--count", "8", "--mesh", "2,4", "--compile"]
    fields = planned(grok1, *options)
    decode, prefill = fields["compiled"]
    assert (decode["name"], prefill["name"]) == ("decode", "prefill")
    for step in (decode, prefill):
        assert step["weight_bytes"] == fields["weight_bytes"]
        assert step["argument_bytes"] == pytest.approx(
            fields["weight_bytes"] + fields["cache_bytes_per_sequence"], rel=0.05
        )
    text = grok1("plan", *options).out
    assert "decode, 2 x 1" in text
    assert text.splitlines()[-1] == fields["verdict"]


def test_plan_for_a_checkpoint(grok1, checkpoint):
    fields = planned(grok1, "-c", checkpoint, "--device", "h200", "--count", "1")
    assert (fields["model"], fields["context"]) == (str(checkpoint), 64)


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (["--device", "abacus"], 2, "'abacus' is not one of"),
        (["--device", "cpu", "--memory", "lots"], 2, 'expected a size such as 512MB, 80GB or 2GiB, got "lots"'),
        (["--device", "cpu", "--memory", "0GB"], 2, "expected more than 0"),
        (["--device", "h200", "--count", "0"], 2, "0 is not in the range"),
        (
            ["--device", "h200", "--count", "4", "--mesh", "1,8"],
            1,
            "mesh 1,8 needs 8 devices, but only 4 devices are available",
        ),
        (["--device", "h200", "--mesh", "1,5"], 1, "its 48 query heads are not divisible by 5"),
        (["-c", "nowhere"], 1, "no checkpoint found: nowhere does not exist"),
        (["-c", "nowhere", "--preset", "tiny"], 2, "--checkpoint and --preset cannot be used together"),
    ],
)
def test_invalid_plan_options(arguments, code, sentence, grok1):
    result = grok1("plan", *arguments)
    assert result.code == code
    assert result.out == ""
    assert sentence in " ".join(result.err.split())


def test_release_that_does_not_fit_is_not_loaded(grok1, hollow_release, golden, monkeypatch):
    tokenizer = golden.parent / "release" / "tokenizer.model"
    monkeypatch.setattr(memory, "available_bytes", lambda: 64 * 10**9)
    result = grok1("run", "-c", hollow_release, "--tokenizer", tokenizer, "--mesh", "1,1", "hello")
    assert result.code == 1
    assert result.err == (
        "grok1: error: the model needs 323 GB of memory (318 GB for weights, the rest for one sequence), but 64.0 GB "
        "is available on this machine; use a machine with 323 GB of free memory\n"
    )


def test_hosts_show_traffic_and_unused_devices(grok1):
    fields = planned(grok1, "--device", "h100-80gb", "--hosts", "4,6")
    assert (fields["mesh"], fields["hosts"], fields["idle_devices"]) == ([1, 8], [4, 6], 2)
    assert fields["host_of_shards"] == [[0] * 4 + [1] * 4]
    # all-reduces of 129 x 6144 bfloat16 values over a ring of 8, and an all-gather of 131072 float32 logits
    assert fields["crossing_bytes_per_token"] == (2 * 129 * 6144 * 2 + 131072 * 4) * 7 // 8
    text = grok1("plan", "--device", "h100-80gb", "--hosts", "4,6").out
    assert re.search(r"model shards of each data row +host 0: 4 \+ host 1: 4\n", text)
    assert re.search(r"unused devices +2 on host 1\n", text)
    assert re.search(r"sent between hosts per token +3.23 MB\n", text)


def test_model_that_fits_on_a_host_is_replicated_per_host(grok1):
    fields = planned(grok1, "--device", "h100-80gb", "--hosts", "8,8")
    assert (fields["mesh"], fields["crossing_bytes_per_token"]) == ([2, 8], 4)
    assert fields["host_of_shards"] == [[0] * 8, [1] * 8]


def test_duplicated_shards_cost_memory(grok1):
    few, many = (planned(grok1, "--device", "h100-80gb", "--count", str(count)) for count in (8, 16))
    whole = planned(grok1, "--device", "h100-80gb", "--count", "1", "--mesh", "1,1")["weight_bytes"]
    for fields in (few, many):
        assert fields["replicated_weight_bytes"] == fields["mesh"][1] * fields["weight_bytes"] - whole
    assert many["replicated_weight_bytes"] > 5 * few["replicated_weight_bytes"] > 0


def test_cpus_of_several_hosts_have_separate_memory(grok1):
    alone = planned(grok1, "--device", "cpu", "--memory", "200GB", "--mesh", "1,2")
    both = planned(grok1, "--device", "cpu", "--memory", "200GB", "--mesh", "1,2", "--hosts", "1,1")
    assert (alone["fits"], both["fits"]) == (False, True)


def test_count_that_contradicts_hosts_is_rejected(grok1):
    result = grok1("plan", "--device", "h200", "--count", "7", "--hosts", "4,4")
    assert result.code == 2
    assert "--count is 7, but the devices of --hosts add up to 8" in result.err
