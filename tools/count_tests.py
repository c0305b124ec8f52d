#!/usr/bin/env python3
"""Counts the test cases of Bazel invocations, given their --build_event_json_file files, and of
pytest's, given their --junit-xml files, which end in .xml.

Prints "passed failed skipped". A test that timed out or died without saying which case failed counts
as one failed case, a test target that Bazel skipped as one skipped. What did not build is not here:
Bazel's exit code says so.
"""

import json
import sys
import urllib.parse
import xml.etree.ElementTree as ElementTree


def count_cases(xml_path):
    """(passed, failed, skipped) of a JUnit-like test.xml, as gtest or Bazel wrote it."""
    passed = failed = skipped = 0
    for suite in ElementTree.parse(xml_path).getroot().iter("testsuite"):
        for case in suite.findall("testcase"):
            if case.find("failure") is not None or case.find("error") is not None:
                failed += 1
            elif case.find("skipped") is not None or case.get("status") == "notrun":
                skipped += 1
            else:
                passed += 1
    return passed, failed, skipped


def count_target(result):
    """The same of one run of one test target."""
    passed = failed = skipped = 0
    for output in result.get("testActionOutput", []):
        if output["name"] == "test.xml":
            path = urllib.parse.unquote(urllib.parse.urlparse(output["uri"]).path)
            passed, failed, skipped = count_cases(path)
    if result.get("status") != "PASSED" and failed == 0:
        failed = 1
    return passed, failed, skipped


def count_events(path):
    """A list of such counts, one for each target."""
    counts = []
    tests = set()
    with open(path, encoding="utf-8") as lines:
        for event in map(json.loads, lines):
            target = next(iter(event["id"].values())).get("label")
            if event.get("configured", {}).get("targetKind", "").endswith("_test rule"):
                tests.add(target)
            if "testResult" in event:
                counts.append(count_target(event["testResult"]))
            elif event.get("aborted", {}).get("reason") == "SKIPPED" and target in tests:
                counts.append((0, 0, 1))
    return counts


def main():
    counts = [(0, 0, 0)]
    for path in sys.argv[1:]:
        counts += [count_cases(path)] if path.endswith(".xml") else count_events(path)
    print(*map(sum, zip(*counts)))


if __name__ == "__main__":
    main()
