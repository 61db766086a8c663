"""RoBERTa: BERT with other names; positions start after pad_token_id."""

from distill.models.layouts.bert import TIED, encoder
from distill.models.layouts.parts import HIDDEN, layer_norm, linear
from distill.pruning.layout import Parameter

PINNED = ("pad_token_id",)

LAYOUT = encoder(
    "roberta",
    "roberta",
    [
        *linear("lm_head.dense", HIDDEN, HIDDEN),
        *layer_norm("lm_head.layer_norm"),
        Parameter("lm_head.bias", ("vocabulary",)),
        Parameter("lm_head.decoder.weight", ("vocabulary", HIDDEN), unless=TIED),
        Parameter("lm_head.decoder.bias", ("vocabulary",), unless=TIED),
    ],
    PINNED,
)
OTHER_HEADS = (
    encoder(
        "roberta",
        "roberta",
        [*linear("classifier.dense", HIDDEN, HIDDEN), *linear("classifier.out_proj", "classes", HIDDEN)],
        PINNED,
        "classification",
    ),
    encoder("roberta", "roberta", [*linear("classifier", "classes", HIDDEN)], PINNED, "token_classification"),
    encoder("roberta", "", [*linear("pooler.dense", HIDDEN, HIDDEN)], PINNED, "embedding"),
)
