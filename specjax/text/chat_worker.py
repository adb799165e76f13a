"""The process that renders chat templates; `specjax.text.chat` starts it.

A template comes with a model's files and may contain anything. Jinja's sandbox isolates it, but a single operation can
take unbounded time and memory, in code that no signal interrupts; so a separate process renders it, under limits that
the operating system enforces. Requests and answers are lines of JSON.
"""

import contextlib
import json
import sys
from typing import Any

try:
    import resource
except ImportError:  # Windows, where only the time is bounded, by the process that waits.
    resource = None


def _limit_memory(extra: int) -> None:
    """Bounds the address space to what is in use plus that many bytes."""
    if resource is not None:
        with contextlib.suppress(OSError, ValueError), open("/proc/self/statm") as file:
            most = int(file.read().split()[0]) * resource.getpagesize() + extra
            resource.setrlimit(resource.RLIMIT_AS, (most, most))


def _limit_time(seconds: float) -> None:
    """Ends this process after that many further seconds of CPU time, even if nothing waits for it any more."""
    if resource is not None:
        used = sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
        _, hard = resource.getrlimit(resource.RLIMIT_CPU)
        resource.setrlimit(resource.RLIMIT_CPU, (int(used + seconds) + 2, hard))


def _answer(render: Any, request: dict[str, Any]) -> dict[str, Any]:
    try:
        (text,), _ = render(
            [request["messages"]],
            tools=request["tools"],
            chat_template=request["template"],
            add_generation_prompt=request["add_generation_prompt"],
            continue_final_message=request["continue_final_message"],
            **request["variables"],
        )
    except MemoryError:
        return {"memory": True}
    except Exception as error:  # Whatever the template does.
        return {"error": f"{type(error).__name__}: {str(error)[:500]}"}
    return {"length": len(text)} if len(text) > request["max_length"] else {"text": text}


def main() -> None:
    """Answers requests until there are no more."""
    from transformers.utils.chat_template_utils import render_jinja_template

    answers, sys.stdout = sys.stdout, sys.stderr
    print(json.dumps({"ready": True}), file=answers, flush=True)
    _limit_memory(int(sys.argv[1]))
    for line in sys.stdin:
        request = json.loads(line)
        _limit_time(request["seconds"])
        print(json.dumps(_answer(render_jinja_template, request)), file=answers, flush=True)


if __name__ == "__main__":
    main()
