"""Documents to evaluate on, as a task reads them."""

from diffusionlm.data import items, sources
from diffusionlm.errors import UserError
from diffusionlm.pretrained.model import LoadedModel
from diffusionlm.scalars import whole


def source(data: str, field: str) -> sources.Source:
    """Return the documents of a file, a directory or a corpus; of a corpus, those of its validation split."""
    splits = sources.resolve(data, field)
    return splits.get("validation", splits["train"])


def checked_limit(limit: int | None) -> int | None:
    """Return the number of items to take, or None for all; raise `UserError` for one below 1."""
    return None if limit is None else whole("limit", limit, 1, "be at least 1, or be left out for all")


def read_texts(model: LoadedModel, data: str, field: str, limit: int | None) -> list[str]:
    """Return the texts that are not empty; `UserError` if there are none, or for one that holds the mask's token."""
    model.require_tokenizer()
    texts, mask_id = [], model.config.mask_id
    in_vocabulary = mask_id is not None and mask_id < model.config.model.vocab_size  # else no text holds it
    for item in source(data, field):
        if len(texts) == limit:
            break
        try:
            text = items.text_of(item, field)
        except ValueError as error:
            raise UserError(f"{item.location}: {error}") from error
        if text and in_vocabulary and mask_id in model.encode(text):
            raise UserError(
                f"{item.location} has the token {mask_id}, which stands for masks in this model, so that it can be "
                "neither read nor scored; leave that document out"
            )
        if text:
            texts.append(text)
    if not texts:
        raise UserError(f"data={data!r} holds no text; there is nothing to score")
    return texts
