"""A Mamba of width 8 that recalls sixteen queries, with weights written down, not trained.

    python report/construct.py                         print its accuracy up to 8,192 tokens
    python report/construct.py --lengths 1048576 --sequences 64     at 2^20, in a quarter of an hour

No training run has found such a model (report/README.md, "Why does a narrow Mamba not learn sixteen
queries?"). This one shows that it exists: two layers of 16 channels and 16 states, as `mamba` has.

Place the sixteen tokens in a table of four rows and four columns, token 4 r + c in row r, column c.

Layer 1 turns the embedding of a token into two one-hot vectors, of its row and its column. Each
channel detects one token: SiLU is x above ON and 0 below -ON, nearly. out_proj adds the difference
between the two one-hot vectors and the embedding, so that they replace it.

Layer 2 stores, for every token, a number that stands for the token that came after it. Its
channels are four of each kind:

    row      ON + column code of the previous token + SHARE * code of this token, if the previous
             token is in row r, otherwise 0
    column   ON if the previous token is in column c, otherwise 0; B is these four
    now      ON if this token is in column c, otherwise 0; C is these four
    offset   ON + column code of this token

The states of the row channels are then a table of four rows and four columns, one cell per token;
nothing in it decays. At the query, C selects its column and the gate its row. What is read there is
what the row channel wrote: the offset is subtracted, and SHARE * code of the value remains.

A channel has one row of in_proj for both taps of its convolution, so what detects the previous
token also sees the present one: the code of a token depends on the row of the query. This is the
price of keys and values that share channels. So the head has a table of codes for each row: it
picks the largest of sixteen lines, each above the others where its token's code is.
"""

import math
import os
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

import torch
import torch.nn.functional as F

from eval import accuracy_by_length
from hybrid import build_model
from output import Parser

K = 16                       # tokens
ON = 30.0                    # SiLU(ON) is ON and SiLU(-ON) is 0, up to 3e-12
SHARE = 0.1                  # of this token in a row channel
COLUMN = 0.1 * torch.arange(4.0)     # code of a column
ROW = 0.4 * torch.arange(4.0)        # code of a row, except the channel's own, which has 2 ON
BEFORE, NOW = 2, 3           # taps of the convolution: the previous token, this token
FORGET_NOTHING = -40.0       # of A_log: A is -4e-18
LENGTHS = 2, 8, 16, 64, 128, 192, 1024, 8192
NO_STEP, STEP_1 = -40.0, math.log(math.e - 1)    # biases of dt: softplus gives 4e-18 and 1


@torch.no_grad()
def build():
    """The model, as train.py builds `mamba` with d = 8, with other numbers in it."""
    model = build_model("mamba")
    for layer in model.layers:
        for p in layer.parameters():
            p.zero_()
        layer.A_log.fill_(FORGET_NOTHING)
        layer.dt_proj.bias.fill_(NO_STEP)
    tokens = torch.arange(K)
    table = torch.cat([F.one_hot(tokens // 4), F.one_hot(tokens % 4)], dim=1).float()    # (16, 8)
    first(model.layers[0], model.norms[0], model.embedding.weight, table)
    codes = second(model.layers[1], model.norms[1], table)
    head(model.head[1].weight, SHARE * codes)
    return model


def first(layer, norm, e, table):
    """Layer 1: what is added to the embeddings e (16, 8) makes them the rows of table (16, 8)."""
    norm.bias[0] = 10.0                                  # for gates that are open to all tokens
    scores = norm(e) @ e.T                               # (token, channel), largest where they meet
    own = scores.diag().clone()
    next_best = scores.fill_diagonal_(-torch.inf).max(0).values
    gain = 2 * ON / (own - next_best)
    x, z = layer.in_proj.weight.chunk(2)                 # (16, 8) each
    x.copy_(gain[:, None] * e)                           # a channel for each token
    z[:, 0] = 0.1                                        # about 1, from the bias of 10
    layer.conv1d.weight[:, 0, NOW] = 1.0
    layer.conv1d.bias.copy_(-gain * (own + next_best) / 2)
    layer.D.fill_(1.0)                                   # the state is not used
    y = F.silu(norm(e) @ x.T + layer.conv1d.bias) * F.silu(norm(e) @ z.T)    # (token, channel)
    layer.out_proj.weight.copy_(torch.linalg.solve(y, table - e).T)


def second(layer, norm, table):
    """Layer 2. Returns the codes of all tokens in each row channel, (4, 16).

    Channels 0 to 3 are the row channels, then come column, now and offset.
    """
    row, column = torch.eye(8).chunk(2)                         # what to multiply with a table row
    always = row.sum(0)                                         # 1 for every token
    x, z = torch.zeros(2, 4, 4, 8)                              # (kind, channel, 8)
    x[0] = torch.cat([ROW.expand(4, 4), COLUMN.expand(4, 4)], dim=1)
    x[0, range(4), range(4)] = 2 * ON
    x[1] = x[2] = 2 * ON * column
    x[3, :, 4:] = COLUMN
    z[0] = z[3] = 2 * ON * row - ON * always                    # open if this token is in the row
    z[1], z[2] = -ON * always, ON * always
    layer.in_proj.weight.copy_(torch.cat([x, z]).flatten(0, 1) / norm(table).max())
    taps = layer.conv1d.weight.view(4, 4, 4)                    # (kind, channel, tap)
    taps[:2, :, BEFORE] = 1.0
    taps[0, :, NOW] = SHARE
    taps[2:, :, NOW] = 1.0
    layer.conv1d.bias.view(4, 4).copy_(torch.tensor([-ON, -ON, -ON, ON])[:, None])
    layer.x_proj.weight[1:5, 4:8] = torch.eye(4) / ON           # B: the column channels
    layer.x_proj.weight[17:21, 8:12] = torch.eye(4) / ON        # C: the now channels
    layer.dt_proj.bias[:4] = STEP_1                             # only row channels have a state
    layer.D[8:] = 1.0                                           # now and offset pass on their input
    out = layer.out_proj.weight.view(8, 4, 4)[4:]               # (8 - 4, kind, channel)
    out[:, 0] = torch.eye(4) / ON                               # the open gate has multiplied by ON
    out[:, 3] = -torch.eye(4) / ON
    out[:, 2] = -torch.eye(4) / ON**2                           # the column leaves the stream, too
    return x[0] @ table.T


def head(weight, codes):
    """The residual stream now has the row of the query, one-hot, and after it the code y that was
    read, in the place of that row. Token number k, counted from the smallest of the row's codes
    (4, 16), gets the logit k y - c_k. The steps of c_k are midway between codes k - 1 and k, so the
    largest logit is that of the code nearest to y; the norm scales all logits alike.
    """
    for r in range(4):
        order = codes[r].argsort()
        y = codes[r][order]
        constants = torch.cat([torch.zeros(1), (y[1:] + y[:-1]) / 2]).cumsum(0)
        weight[order, 4 + r] = torch.arange(float(K))
        weight[order, r] = -constants


def main(argv=None):
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--lengths", nargs="+", type=int, default=LENGTHS, metavar="N",
                        help="context lengths, at least 2 (default: 2 to 8,192)")
    parser.add_argument("--sequences", type=int, default=1024, metavar="N",
                        help="least number of sequences per length (default: 1024)")
    args = parser.parse_args(argv)
    lengths = sorted(set(args.lengths))
    if lengths[0] < 2 or args.sequences < 1:
        parser.error("--lengths must be at least 2, --sequences at least 1")
    model = build().eval()
    accuracies = accuracy_by_length(model, lengths, K, M=16, tau=1, sequences=args.sequences)
    print(f"{model.n_params():,} parameters, none of them trained")
    for length, accuracy in zip(lengths, accuracies):
        print(f"{length:>7} tokens: {accuracy:.3f}")


if __name__ == "__main__":
    main()
