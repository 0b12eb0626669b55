"""Command: retrieve the passages that come next."""

if __name__ == "__main__":
    from entrypoints.cli import start

    start("predict")

import json
from dataclasses import asdict
from pathlib import Path

from entrypoints.cli import EntryPoint
from entrypoints.options import PredictOptions
from lvm.bank.bank import Bank
from lvm.bank.files import file_sha256
from lvm.models.predict import predict_contexts
from lvm.report.evaluation import passages_table
from lvm.report.tables import fenced
from lvm.serving.batch import (
    Batch,
    open_contexts,
    open_predictor,
    open_retriever,
    read_contexts,
    search_facts,
)
from lvm.serving.predictor import Wanted
from lvm.system.atomic import check_writable, jsonable
from lvm.tracking import runs
from lvm.tracking.logged_models import Predictor, check_subject
from lvm.tracking.registry import Registry
from lvm.tracking.runs import publish_report
from lvm.windows.planning import first_read

BLOCKS = Path("data/predictions")
DESCRIBED = 5  # passages in the run's description


def check(options: PredictOptions) -> None:
    """Raise ValueError if there is no such predictor, or no table can be written."""
    if options.queries is not None and options.out is None:
        raise ValueError("queries: are answered to a table; give out=<a .parquet file>")
    if options.out is not None:
        if options.text is not None:
            raise ValueError("out: text is one context, which is printed; omit out")
        if not options.out.endswith(".parquet"):
            raise ValueError(f"out: {options.out} is not the name of a .parquet file")
        check_writable("out", options.out)
    check_subject(options.model, Registry(options.registry))


def body(options: PredictOptions) -> None:
    """Retrieve the k passages that most likely follow a context, or each of several."""
    registry = Registry(options.registry)
    predictor, bank = open_predictor(options.model, options.bank, options.ctx, registry)
    ctx = options.ctx or predictor.facts.ctx
    if options.out is not None:
        return answer_all(options, predictor, bank, ctx)
    context_BTD, sentences = read_contexts(options.text, options.context, bank)
    num_read = context_BTD.shape[1] - first_read(context_BTD.shape[1], ctx)
    runs.log_config(asdict(options) | {"bank": str(bank.path), "rows": num_read})
    retriever = open_retriever(predictor, bank, ctx, options.rerank)
    prediction_BD = predict_contexts(predictor.model, context_BTD, ctx)
    wanted = Wanted(options.k, options.rerank, options.keep_context)
    row_BK, score_BK = retriever.best(context_BTD, prediction_BD, wanted, sentences)
    answered = search_facts(predictor, retriever, options.rerank)
    answered |= {"bank": str(bank.path), "context_rows": num_read}
    reports = [
        answered | {"passages": retriever.describe(row_K, score_K)}
        for row_K, score_K in zip(row_BK, score_BK, strict=True)
    ]
    report = reports[0] if len(reports) == 1 else {"contexts": reports}
    shown = "\n\n".join(
        f"context {number} of {len(reports)}: " * (len(reports) > 1)
        + passages_table(one, options.k)
        for number, one in enumerate(reports, start=1)
    )
    asked_file = Path(str(options.text or options.context)).name
    runs.name_run(f"{predictor.facts.model} ctx {ctx} after {asked_file}")
    first = reports[0] | {"passages": reports[0]["passages"][:DESCRIBED]}
    runs.describe_run(fenced(passages_table(first, min(options.k, DESCRIBED))))
    runs.log_artifact(shown + "\n", "predictions.txt")
    publish_report(report, None)
    print(json.dumps(jsonable(report), indent=1) if options.format == "json" else shown)


def answer_all(options: PredictOptions, predictor: Predictor, bank: Bank, ctx: int) -> None:
    """Write the passages after all contexts to a table; an interrupted run goes on."""
    contexts = open_contexts(options.context, options.queries, predictor, bank, ctx)
    runs.log_config(asdict(options) | {"bank": str(bank.path), "contexts": len(contexts)})
    asked = options.queries or str(options.context)
    runs.name_run(f"{predictor.facts.model} ctx {ctx} after {Path(asked).name}")
    retriever = open_retriever(predictor, bank, ctx, options.rerank)
    wanted = Wanted(options.k, options.rerank, options.keep_context)
    out = Path(str(options.out))
    num = Batch(contexts, retriever, predictor.model, wanted, BLOCKS).write(out)
    answered = search_facts(predictor, retriever, options.rerank)
    written = {"out": str(out), "contexts": len(contexts), "passages": num}
    publish_report(answered | written | {"sha256": file_sha256(out)}, None)
    print(f"{num:,} passages after {len(contexts):,} contexts, by {answered['score']}: {out}")


main = EntryPoint("predict", PredictOptions, body, check)
