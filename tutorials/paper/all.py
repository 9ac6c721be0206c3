"""All figures, the cheapest first, then the table; options go to every script.

python tutorials/paper/all.py --quick
"""

import json
import subprocess
import sys
from pathlib import Path

import table
from options import parse

HERE = Path(__file__).parent


def cost(script):
    """Seconds that a figure took when its results were written; unknown ones last."""
    record = HERE / "results" / f"{script.stem.split('_')[0]}.json"
    seconds = json.loads(record.read_text())["seconds"] if record.exists() else None
    return (seconds is None, seconds or 0, script.name)


def main(arguments):
    """Run them; a script that fails does not stop the others."""
    options = parse(__doc__, arguments=arguments)
    scripts = [*HERE.glob("fig[0-9]*_*.py"), *HERE.glob("thm[0-9]*_*.py")]
    failed = []
    for script in sorted(scripts, key=cost):
        print(f"\n{script.name}", flush=True)
        if subprocess.run([sys.executable, script, *arguments], check=False).returncode:
            failed.append(script.name)
    if not options.quick:
        table.main()
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
