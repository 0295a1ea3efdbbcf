"""python -m tests.conformance [--record]"""

import argparse
import sys

from tests.conformance import cases, golden
from tests.conformance.build import build, gpu, serves, target
from tests.conformance.worker import Worker


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.conformance", description=__doc__)
    parser.add_argument("--record", action="store_true", help="write golden.json")
    arguments = parser.parse_args()
    name, capability = gpu()
    path = build(target(capability))
    worker, results, failed, skipped = Worker(path), [], 0, 0
    for case in cases():
        if not serves(case.needs, capability):
            skipped += 1
            continue
        result = worker.run(case.name)
        if isinstance(result, str):
            failed += 1
            print(f"{case.name}: {result}", flush=True)
            worker.stop()
            worker = Worker(path)
            continue
        results.append((case, result))
        try:
            case.check(result)
        except AssertionError as error:
            failed += 1
            print(error, flush=True)
    worker.stop()
    print(f"{name}: {len(results)} cases ran, {failed} failed, {skipped} need another GPU")
    if arguments.record:
        golden.record(name, results)
        print(f"wrote {golden.PATH}")
    return failed != 0


if __name__ == "__main__":
    sys.exit(main())
