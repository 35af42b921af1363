"""The benchmark of long batch jobs, in its short form."""


def test_memory_and_first_answers(script):
    report = script("million_lines").measure(lines=3000, answers=20)
    assert report["answers"] == 20
    assert report["lines_found_again"] % 16 == 0  # the job writes whole batches
    assert 0 < report["lines_checked_s"] < report["first_answer_s"] < report["all_s"]
    assert report["peak_mib_above_model"] < 200
