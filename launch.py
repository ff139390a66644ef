"""The command line: parses, validates and calls the package. `python launch.py VERB` or `rairl VERB`."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Annotated

import typer

from rairl_ray.config.load import load_config, warm_start_chain
from rairl_ray.config.rules import check_files
from rairl_ray.config.schema import RunConfig
from rairl_ray.errors import RunFailure, UserError
from rairl_ray.jobs.commands import Address, CaFile, jobs_app, wide_console
from rairl_ray.jobs.secrets import open_sealed

# Before any library is imported: no progress bars, no guesses, and of Intel's OpenMP no children on one core.
for _name, _value in (("TQDM_DISABLE", "1"), ("TRANSFORMERS_VERBOSITY", "error"), ("KMP_AFFINITY", "none")):
    os.environ.setdefault(_name, _value)
if shutil.which("nvidia-smi") is None:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

app = typer.Typer(
    name="rairl",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="R-AIRL: learn reasoning rewards from expert demonstrations, and policies from those rewards.",
)

ConfigFile = Annotated[str, typer.Argument(metavar="CONFIG", help="YAML experiment file.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Overrides such as trainer.steps=10.")
]


@app.command()
def plan(
    config: ConfigFile,
    overrides: Overrides = None,
    gpus: Annotated[int | None, typer.Option(min=0, help="GPUs a node of a hypothetical cluster.")] = None,
    nodes: Annotated[int | None, typer.Option(min=1, help="Nodes of a hypothetical cluster.")] = None,
    cpus: Annotated[int | None, typer.Option(min=1, help="CPUs a node of a hypothetical cluster.")] = None,
    address: Annotated[str | None, typer.Option(metavar="HOST:PORT", help="Ask this running cluster.")] = None,
) -> int:
    """Show the resolved configuration, placement, steps, tokens and memory of a run or a sweep; take nothing.

    \b
    Examples:
      rairl plan experiments/gsm8k/qwen2.5-3b_airl.yaml --gpus 8 --nodes 1
      rairl plan experiments/sweeps/demo.yaml --cpus 16
    """
    from rairl_ray.plan import show_plan
    from rairl_ray.sweep.file import is_sweep, load_sweep
    from rairl_ray.sweep.plan import show_sweep_plan

    if is_sweep(config):
        show_sweep_plan(load_sweep(config, overrides or []), wide_console(), gpus, nodes, cpus, address)
    else:
        show_plan(_load(config, overrides), wide_console(), gpus, nodes, cpus, address)
    return 0


@app.command()
def train(
    config: Annotated[
        str, typer.Argument(metavar="[CONFIG]", help="YAML experiment file; none with --fork.")
    ] = "",
    overrides: Overrides = None,
    resume: Annotated[str | None, typer.Option(metavar="RUN", help="Continue this run folder or name.")] = None,
    fork: Annotated[
        str | None,
        typer.Option(metavar="RUN@STEP", help="Start from this checkpoint, with the run's own configuration."),
    ] = None,
) -> int:
    """Train one run: algorithm.type airl, grpo or sft.

    \b
    Example:
      rairl train experiments/demo/airl.yaml reward.density.type=dense trainer.steps=20
    """
    start = None
    if fork is not None:
        from rairl_ray.trainer.fork import fork_of

        start = fork_of(fork, [config, *(overrides or [])] if config else [], resume)
    elif not config:
        raise UserError("train: CONFIG is missing; name a YAML experiment file")
    resolved = _load(config, overrides) if start is None else start.config
    check_files(resolved)
    # Heavy imports wait until the configuration is known to be good.
    from rairl_ray.trainer.run import SignalStop
    from rairl_ray.trainer.run import run as run_training

    return run_training(resolved, resume=resume, fork=start, stop=SignalStop()).exit_code


@app.command()
def sweep(
    config: Annotated[str, typer.Argument(metavar="SWEEP.yaml", help="Base experiment, space, seeds, search.")],
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option(help="Continue the sweep of this file.")] = False,
    dry_run: Annotated[bool, typer.Option(help="Show the trials; start nothing.")] = False,
    status: Annotated[
        bool, typer.Option("--status", help="Show how it stands; also by its name or folder, in any shell.")
    ] = False,
    stop: Annotated[
        bool, typer.Option("--stop", help="End it with checkpoints; also by its name, from any shell.")
    ] = False,
    trial: Annotated[str | None, typer.Option(metavar="ID", help="With --stop: this trial alone.")] = None,
) -> int:
    """Run an experiment at every point of a space, with every seed, by Ray Tune.

    \b
    Examples:
      rairl sweep experiments/sweeps/demo.yaml
      rairl sweep experiments/sweeps/demo.yaml --resume
      rairl sweep --status sweeps/demo
      rairl sweep --stop sweeps/demo
    """
    if resume + dry_run + status + stop > 1 or (trial is not None and not stop):
        raise UserError(
            "sweep: one of --resume, --dry-run, --status, --stop at a time; --trial goes with --stop"
        )
    if status or stop:
        from rairl_ray.display import Display
        from rairl_ray.sweep.status import find_sweep, show_status
        from rairl_ray.sweep.stopping import ask_to_stop

        found = find_sweep(config, overrides or [])
        if stop:
            print(ask_to_stop(found, trial))
        else:
            show_status(found, Display(found.name, 0))
        return 0
    from rairl_ray.sweep.file import load_sweep

    loaded = load_sweep(config, overrides or [])
    if dry_run:
        from rairl_ray.sweep.plan import list_trials

        list_trials(loaded)
        return 0
    from rairl_ray.sweep.run import sweep as run_sweep

    return run_sweep(loaded, resume)


@app.command()
def evaluate(
    target: Annotated[str, typer.Argument(metavar="CONFIG|RUN|MODEL", help="YAML, run, folder or hub id.")],
    overrides: Overrides = None,
) -> int:
    """Sample a policy on held-out problems, or read given completions: pass@k, reranking, calibration.

    \b
    Examples:
      rairl evaluate demo/airl eval.samples_per_prompt=16 'eval.k=[1,4,16]'
      rairl evaluate experiments/demo/airl.yaml                     the model before any training
      rairl evaluate Qwen/Qwen2.5-3B-Instruct data.task=gsm8k model.policy.dtype=bfloat16
      rairl evaluate demo/airl eval.mode=pregenerated_policy eval.input=completions.jsonl
    """
    from rairl_ray.verbs.evaluate import evaluate as run_evaluation

    return run_evaluation(target, overrides or [])


@app.command()
def score(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Run, reward-model folder or hub id.")],
    file: Annotated[str, typer.Argument(metavar="FILE.jsonl", help="Rows with a prompt and a completion.")],
    overrides: Overrides = None,
    output: Annotated[str, typer.Option(metavar="OUT.jsonl", help="The same rows with their rewards.")] = "",
) -> int:
    """Score anybody's completions with a learned reward: one output line per input line.

    \b
    Example:
      rairl score demo/airl completions.jsonl --output scored.jsonl eval.selector=min
    """
    if not output:
        raise UserError("--output is missing; name the file to write: --output OUT.jsonl")
    from rairl_ray.verbs.score import score as score_file

    return score_file(run, Path(file), Path(output), overrides or [])


@app.command()
def report(
    sources: Annotated[
        list[str], typer.Argument(metavar="RUN|SWEEP|FILE...", help="Run folders, sweeps or evaluation files.")
    ],
    output: Annotated[str | None, typer.Option(metavar="FOLDER", help="Where to write the report.")] = None,
) -> int:
    """Make every figure and table of runs, a sweep or evaluation files, and one self-contained page.

    \b
    Example:
      rairl report runs/demo/airl
      rairl report runs/demo/sft runs/demo/airl --output runs/comparison
    """
    from rairl_ray.report.report import make_report, show_report

    show_report(*make_report(sources, output), wide_console())
    return 0


@app.command()
def localise(
    run: Annotated[
        str, typer.Argument(metavar="RUN", help="Run, reward-model folder or hub id; with --scores a file.")
    ],
    rest: Annotated[
        list[str] | None,
        typer.Argument(metavar="[FILE] [KEY=VALUE]...", help="Traces in steps with the first wrong one."),
    ] = None,
    output: Annotated[str | None, typer.Option(metavar="OUT.jsonl", help="A copy of the rows.")] = None,
    scores: Annotated[
        str | None, typer.Option(metavar="COLUMN", help="Judge this column of step scores, no model.")
    ] = None,
    baselines: Annotated[bool, typer.Option(help="Read the traces with the run's policy, too.")] = True,
) -> int:
    """Name the first wrong step of each trace by its reward; without FILE one error is injected in each expert.

    \b
    Examples:
      rairl localise demo/airl
      rairl localise demo/airl first_errors.jsonl --output named.jsonl eval.localisation_readout=argmin
      rairl localise first_errors.jsonl --scores step_scores
    """
    from rairl_ray.verbs.localise import localise as localise_errors

    files = [text for text in rest or [] if "=" not in text]
    if len(files) > 1:
        raise UserError(f"localise: {files[1]}: one file at a time, after {files[0]}")
    return localise_errors(
        run,
        Path(files[0]) if files else None,
        output=None if output is None else Path(output),
        scores=scores,
        baselines=baselines,
        overrides=[text for text in rest or [] if "=" in text],
    )


@app.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
def transfer(
    runs: Annotated[
        list[str],
        typer.Argument(metavar="POLICY_RUN... --reward RUN... [KEY=VALUE]...", help="Finished runs."),
    ],
) -> int:
    """Judge every policy's samples, and every domain's injected errors, with every reward.

    \b
    Example:
      rairl transfer demo/airl_three demo/airl_countdown --reward demo/airl_three demo/airl_countdown
    """
    from rairl_ray.verbs.transfer import transfer as transfer_runs

    sides: dict[str, list[str]] = {"policy": [], "reward": []}
    side, overrides = "policy", []
    for text in runs:
        if text == "--reward":
            side = "reward"
        elif text.startswith("-"):
            raise UserError(f"transfer: {text}: no such option; write POLICY_RUN... --reward RUN...")
        elif "=" in text:
            overrides.append(text)
        else:
            sides[side].append(text)
    return transfer_runs(sides["policy"], sides["reward"], overrides)


@app.command()
def doctor(
    model: Annotated[str | None, typer.Argument(help="Model folder, hub id, experiment file or run.")] = None,
    overrides: Overrides = None,
    address: Annotated[str | None, typer.Option(help="Ray cluster to ask for its resources.")] = None,
) -> int:
    """Show what is installed, or what MODEL's tokenizer and template need; what will not work and why.

    \b
    Examples:
      rairl doctor
      rairl doctor --address 10.0.0.1:6379
      rairl doctor experiments/demo/airl.yaml
    """
    from rairl_ray.doctor import diagnose, diagnose_model

    if model is not None:
        return diagnose_model(wide_console(), model, overrides or [])
    return diagnose(wide_console(), address)


# --- jobs -------------------------------------------------------------------------------------------

app.add_typer(jobs_app, name="jobs")


@app.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
def submit(
    call: Annotated[list[str], typer.Argument(metavar="VERB ARGS...", help="As on this command line.")],
    address: Address = None,
    ca_file: CaFile = None,
    follow: Annotated[bool, typer.Option("--follow", help="Stream the logs; exit as the job does.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be sent and placed.")] = False,
    again: Annotated[bool, typer.Option("--again", help="Run a job anew that has ended.")] = False,
    secret: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Environment variable to send sealed; repeatable.")
    ] = None,
    working_dir: Annotated[
        str | None, typer.Option(metavar="PLACE", help="Code on the nodes or a package's URI; sends nothing.")
    ] = None,
    image: Annotated[str | None, typer.Option(metavar="URI", help="Container image of the job.")] = None,
    python: Annotated[str | None, typer.Option(metavar="PATH", help="The nodes' interpreter.")] = None,
    pip_lock: Annotated[bool, typer.Option("--pip-lock", help="Nodes install the lock (slow).")] = False,
) -> int:
    """Run any verb as a job of a Ray cluster; asking again attaches to it.

    \b
    Examples:
      rairl submit --follow train experiments/demo/sft.yaml output_dir=/shared/runs
      rairl submit --address https://ray.example.org --secret HF_TOKEN train experiments/demo/airl.yaml
    """
    verb, arguments = call[0], call[1:]
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    if verb not in commands or verb in ("submit", "jobs"):
        known = ", ".join(name for name in commands if name not in ("submit", "jobs"))
        raise UserError(f"submit: {verb} is no verb; options of submit stand before it; verbs: {known}")
    commands[verb].make_context(verb, list(arguments))  # raises for what the verb would refuse
    from rairl_ray.jobs.arguments import overrides_of
    from rairl_ray.jobs.client import Connection
    from rairl_ray.jobs.secrets import take_secrets
    from rairl_ray.jobs.submit import Options
    from rairl_ray.jobs.submit import submit as submit_job
    from rairl_ray.sweep.file import load_sweep
    from rairl_ray.sweep.plan import as_run

    config = None
    if verb == "sweep":
        config = as_run(load_sweep(arguments[0], overrides_of(arguments)))
    elif arguments and Path(arguments[0]).suffix in (".yaml", ".yml"):
        config = _load(arguments[0], overrides_of(arguments))
    options = Options(
        working_dir, image, python, "pip" if pip_lock else None,
        take_secrets(secret or [], os.environ), "again" if again else "refuse",
    )  # fmt: skip
    then = "describe" if dry_run else "follow" if follow else "leave"
    root = Path(__file__).resolve().parent
    return submit_job(
        verb, arguments, config, root, Connection(address, ca_file), options, wide_console(), then
    )


def _load(path: str, overrides: list[str] | None) -> RunConfig:
    """The configuration, refused here for all that can be wrong without data, models or machines."""
    from rairl_ray.data.tasks import TASKS, make_task

    config = load_config(path, overrides or [])
    if config.data.task not in TASKS:
        make_task(config.data)  # raises, naming the nearest task
    warm_start_chain(config)
    return config


def _one_line(error: Exception | str) -> str:
    """The first problem whole, and how many more there are."""
    lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    more = f" (and {len(lines) - 1} more)" if len(lines) > 1 else ""
    return f"rairl: error: {lines[0]}{more}"


def main() -> None:
    """Entry point of `rairl`: user errors are one line and exit code 2, Ctrl-C is 130."""
    try:
        open_sealed()
        code = app(args=sys.argv[1:] or ["--help"], standalone_mode=False)
    except UserError as error:
        print(_one_line(error), file=sys.stderr)
        code = 2
    except RunFailure as error:
        print(_one_line(error), file=sys.stderr)
        code = 1
    except KeyboardInterrupt:
        code = 130
    except Exception as error:
        # Typer raises its usage errors in a private module; they all carry these two.
        if not (hasattr(error, "exit_code") and hasattr(error, "format_message")):
            raise
        print(_one_line(error.format_message() or "write --help for the usage"), file=sys.stderr)
        code = 2
    sys.exit(code)


if __name__ == "__main__":
    main()
