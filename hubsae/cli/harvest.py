"""`hubsae harvest`: run texts through a model and write its activations as a dataset."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from hubsae.cli import _options as options
from hubsae.core.options import option_names

PANEL = "Activations"


def command(
    model: Annotated[str, typer.Option("--model", "-m", help="Model id or folder.")],
    dataset: Annotated[
        str, typer.Option("--dataset", "-d", help="Dataset id, or a .jsonl, .csv, .parquet or .txt file.")
    ],
    layers: Annotated[
        str, typer.Option("--layers", "-l", help="Layers such as 6,12,18; 'all'; or hook points such as 12.mlp_out.")
    ],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder to write.")] = None,
    push: Annotated[str | None, typer.Option("--push", help="Dataset repo to publish to when done.")] = None,
    mode: Annotated[str, typer.Option(help="text, prompt, prompt+response, generate or packed.")] = "text",
    select: Annotated[str, typer.Option(help="Tokens to keep: all, prompt, response or assistant.")] = "all",
    exclude: Annotated[
        str | None, typer.Option(help="Groups of tokens not to store: position_0,special,template,role=system ...")
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Stop at a sample that cannot be used.")] = False,
    stage: Annotated[str | None, typer.Option(help="Name of a checkpoint; becomes part of the config names.")] = None,
    adapter: Annotated[str | None, typer.Option(help="LoRA adapter, merged in float32.")] = None,
    tokenizer: Annotated[str | None, typer.Option(help="Tokenizer, if not the model's.")] = None,
    revision: Annotated[str | None, typer.Option(help="Revision of the model.")] = None,
    dataset_config: Annotated[str | None, typer.Option("--dataset-config", help="Config of the dataset.")] = None,
    dataset_split: Annotated[str, typer.Option("--split", help="Split of the dataset.")] = "train",
    streaming: Annotated[
        bool, typer.Option("--streaming", help="Stream the texts instead of downloading them.")
    ] = False,
    prompt_column: Annotated[str | None, typer.Option(help="Column with the prompts.")] = None,
    response_column: Annotated[str | None, typer.Option(help="Column with the responses.")] = None,
    text_column: Annotated[str | None, typer.Option(help="Column with the texts (text and packed modes).")] = None,
    system: Annotated[str | None, typer.Option(help="System message of the chat.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="No chat template.")] = False,
    max_length: Annotated[
        int | None, typer.Option(help="Cut samples at so many tokens; block length when packed.")
    ] = None,
    max_samples: Annotated[int | None, typer.Option(help="Stop after so many samples.")] = None,
    max_tokens: Annotated[
        int | None, typer.Option(help="Stop with the sample that reaches so many kept tokens.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest response (generate).")] = 256,
    temperature: Annotated[float, typer.Option(help="Sampling temperature (generate); 0 is greedy.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    validation: Annotated[float, typer.Option(help="Share of the samples put into the validation split.")] = 0.0,
    split_by: Annotated[str, typer.Option(help="sample, token or tail.")] = "sample",
    reward_model: Annotated[
        str | None, typer.Option(help="Classifier whose scores go into the column 'reward'.")
    ] = None,
    step_separator: Annotated[
        str | None, typer.Option(help="Text that ends a step; the reward model then scores steps.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="Type to store: float16 or float32.")] = "float16",
    scale: options.Scale = "auto",
    model_dtype: Annotated[str | None, typer.Option(help="Type to compute in.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 ...")] = None,
    batch_tokens: Annotated[int | None, typer.Option(help="Tokens per batch, padding included.")] = None,
    window: Annotated[
        int | None, typer.Option(min=1, help="Samples sorted by length together; tasks take whole windows.")
    ] = None,
    executor: options.Executor = None,
    tasks: options.Tasks = 1,
    workers: options.Workers = None,
    executor_set: options.ExecutorSet = None,
    private: options.Private = False,
    as_json: options.Json = False,
) -> None:
    """Write a model's activations at some layers as a dataset; run it again to continue after an interruption.

    Example: hubsae harvest -m Qwen/Qwen2.5-0.5B-Instruct -d openai/gsm8k --dataset-config main
    --layers 6,12,18,23 --mode prompt+response --out acts

    Under `torchrun --nproc-per-node N` with the same arguments every process takes its share. With --executor the work
    is cut into tasks, for a cluster; docs/scale.md has more.
    """
    if out is None and push is None:
        raise typer.BadParameter("give --out DIR, --push REPO, or both")
    separator = step_separator.encode().decode("unicode_escape") if step_separator else None
    from hubsae.activations.harvesting import harvest
    from hubsae.activations.manifest import describe
    from hubsae.activations.ranks import Ranks
    from hubsae.cli._activations import show_activations
    from hubsae.scale.jobs import Harvest

    generation = {"max_new_tokens": max_new_tokens, "do_sample": temperature > 0}
    if temperature > 0:
        generation["temperature"] = temperature
    folder = out or Path(str(push).rpartition("/")[2])
    taken = set(option_names(harvest)) - {"model", "out", "tokenizer"}
    chosen: dict[str, Any] = {name: value for name, value in locals().items() if name in taken}
    chosen |= {"scale": scale if scale == "auto" else float(scale), "exclude": options.names_of(exclude)}
    chosen |= {"validation_fraction": validation, "chat": False if raw else None}
    job = Harvest(
        model=model, dataset=dataset, layers=layers if layers == "all" else options.names_of(layers), out=str(folder),
        loading={"config": dataset_config, "split": dataset_split, "streaming": streaming},
        reward_model=reward_model, separator=separator, tokenizer=tokenizer,
        options=chosen,
    )  # fmt: skip
    options.run_job(job, executor, tasks, workers, executor_set)
    if Ranks.find().rank != 0:
        return
    show_activations(describe(folder), as_json)
    if push is not None:
        from hubsae.cli._common import err
        from hubsae.hub.datasets import push_activations

        done = push_activations(folder, push, private=private or None, notify=err().print)
        err().print(f"published {done.url} ({done.commit[:10]})")
