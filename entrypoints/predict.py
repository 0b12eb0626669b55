"""Command: retrieve the passages that come next."""

if __name__ == "__main__":
    from entrypoints.cli import start

    start("predict")

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from entrypoints.cli import EntryPoint
from entrypoints.options import PredictOptions, check_writable
from lvm.bank.bank import Bank
from lvm.bank.files import file_sha256
from lvm.corpus.encoders import TextEncoder
from lvm.corpus.reading import read_text_file
from lvm.models.facts import OWN_COUNTED, Facts, omits_own_document
from lvm.models.predict import predict_contexts, unit_contexts
from lvm.models.table import FREE_MODELS
from lvm.report.evaluation import passages_table
from lvm.report.tables import fenced
from lvm.retrieval.index import ensure_index
from lvm.retrieval.rerank import NONE
from lvm.serving.batch import ArrayContexts, Batch, QueryContexts, map_contexts
from lvm.serving.predictor import Retriever, Wanted
from lvm.shadow.query_log import log_queries, read_query_log
from lvm.system.atomic import jsonable
from lvm.tracking import datasets, logged_models, runs
from lvm.tracking.datasets import read_bank
from lvm.tracking.logged_models import (
    Predictor,
    check_dim,
    check_subject,
    open_subject,
    reference_in,
)
from lvm.tracking.registry import BASELINE_URI, Registry
from lvm.tracking.runs import publish_report
from lvm.windows.planning import SPLITS, first_read

TABLE, JSON = "table", "json"
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
    predictor, bank = open_predictor(options)
    ctx = options.ctx or predictor.facts.ctx
    if options.out is not None:
        return answer_all(options, predictor, bank, ctx)
    context_BTD, sentences = read_contexts(options, bank)
    num_read = context_BTD.shape[1] - first_read(context_BTD.shape[1], ctx)
    runs.log_config(asdict(options) | {"bank": str(bank.path), "rows": num_read})
    retriever = open_retriever(options, predictor, bank, ctx)
    prediction_BD = predict_contexts(predictor.model, context_BTD, ctx)
    wanted = Wanted(options.k, options.rerank, options.keep_context)
    row_BK, score_BK = retriever.best(context_BTD, prediction_BD, wanted, sentences)
    reports = [
        {
            "model": predictor.facts.model,
            "bank": str(bank.path),
            "bank_sha256": bank.sha256,
            "context_rows": num_read,
            "search": str(retriever.index.facts),
            "score": score_name(retriever, options.rerank, predictor.facts),
            "passages": retriever.describe(row_K, score_K),
        }
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
    print(json.dumps(jsonable(report), indent=1) if options.format == JSON else shown)


def answer_all(options: PredictOptions, predictor: Predictor, bank: Bank, ctx: int) -> None:
    """Write the passages after all contexts to a table; an interrupted run goes on."""
    contexts = many_contexts(options, predictor, bank, ctx)
    runs.log_config(asdict(options) | {"bank": str(bank.path), "contexts": len(contexts)})
    asked = options.queries or str(options.context)
    runs.name_run(f"{predictor.facts.model} ctx {ctx} after {Path(asked).name}")
    retriever = open_retriever(options, predictor, bank, ctx)
    wanted = Wanted(options.k, options.rerank, options.keep_context)
    out = Path(str(options.out))
    num = Batch(contexts, retriever, predictor.model, wanted, BLOCKS).write(out)
    score = score_name(retriever, options.rerank, predictor.facts)
    report = {
        "model": predictor.facts.model,
        "bank_sha256": bank.sha256,
        "out": str(out),
        "contexts": len(contexts),
        "passages": num,
        "search": str(retriever.index.facts),
        "score": score,
        "sha256": file_sha256(out),
    }
    publish_report(report, None)
    print(f"{num:,} passages after {len(contexts):,} contexts, by {score}: {out}")


def many_contexts(
    options: PredictOptions, predictor: Predictor, bank: Bank, ctx: int
) -> ArrayContexts | QueryContexts:
    """Open the contexts of an .npy file, of a split of the bank, or of a query log."""
    model, facts = predictor.model, predictor.facts
    if options.context is not None:
        return ArrayContexts(Path(options.context), model, bank.dim, ctx)
    asked = str(options.queries)
    if asked in SPLITS[1:]:
        plan = {"split": facts.split, "seed": facts.seed}
        inputs = datasets.make_inputs(
            bank, datasets.default_ctx(bank, ctx), None, "prediction", **plan
        )
        return QueryContexts(inputs.windows.queries[asked], model, bank, ctx)
    return QueryContexts(log_queries(read_query_log(Path(asked)), bank, ctx), model, bank, ctx)


def open_predictor(options: PredictOptions) -> tuple[Predictor, Bank]:
    """Read the predictor with its bank; a free one that is named is fitted on train rows first."""
    registry = Registry(options.registry)
    if options.model in FREE_MODELS:
        subject = open_subject(options.model, options.bank, options.ctx)
        return subject.predictor, subject.inputs.bank
    predictor = logged_models.load(reference_in(registry, options.model))
    bank = read_bank(options.bank or predictor.facts.bank)
    if options.model == BASELINE_URI:
        registry.check_bank(bank)
    check_dim(options.model, predictor.facts, bank)
    datasets.log_bank(bank, "prediction")
    return predictor, bank


def open_retriever(
    options: PredictOptions, predictor: Predictor, bank: Bank, ctx: int
) -> Retriever:
    """Open the index over the bank; raises ValueError where it cannot be re-ranked as asked."""
    facts, correction, reranker = predictor.facts, predictor.row_correction, predictor.reranker
    is_own = facts.bank_sha256 == bank.sha256
    if not is_own:
        facts, correction = replace(facts, ctx=ctx), None  # its sequences may be shorter
    if options.rerank != NONE and not is_own:
        raise ValueError(
            f"rerank: {options.model} knows the lanes and words of {facts.bank}, not {bank.path}"
        )
    if options.rerank != NONE and options.model in FREE_MODELS:
        raise ValueError(
            f"rerank: {options.model} is fitted here without lanes; name a registered version of it"
        )
    index = ensure_index(bank, predictor.model, facts, correction)
    return Retriever(index, min(ctx, predictor.facts.ctx), reranker)


def score_name(retriever: Retriever, rerank: str, facts: Facts) -> str:
    """Return what the scores are, with the definition of an older row correction."""
    name = retriever.score_name(rerank)
    is_older = retriever.index.pair_N2 is not None and not omits_own_document(facts.fit_version)
    return f"{name} ({OWN_COUNTED})" if is_older else name


def read_contexts(
    options: PredictOptions, bank: Bank
) -> tuple[NDArray[np.float32], list[list[str]] | None]:
    """Return the contexts (B, T, D) as unit rows, with their sentences if they are given as text.

    Raises ValueError if the file holds none.
    """
    if options.context is not None:
        return unit_contexts(map_contexts(Path(options.context)), bank.dim), None
    path = Path(str(options.text))
    try:
        sentences = read_text_file(path)
    except OSError as error:
        raise ValueError(f"text: {path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"text: {error}") from None
    if not sentences:
        raise ValueError(f"text: {path} holds no sentence of three words or more")
    encoder = TextEncoder(bank.path, bank.encoder, bank.dim, instead="context=<.npy>")
    return encoder.encode(sentences)[None], [sentences]


main = EntryPoint("predict", PredictOptions, body, check)
