"""The experiments of the report: the flags of their runs, their tests and their figures.

make.py makes them. "train" lists flags of train.py without --seed and --out; "test", flags of
eval.py for all runs whose names match a pattern; "draw", flags of plot.py and the title that the
report's figure has, where {} is the folder of the runs.
"""

from hybrid import FAMILY, MODELS

SIX = " ".join(MODELS)
ALL = " ".join([*MODELS, *FAMILY])
RUNGS = ["linear-fixed", "linear-decay", "gated-deltanet", "linear-rotation"]
ATTENTIONS = ["attention", "rope", "alibi", "forgetting"]
LADDER = " ".join([*(f"2x{word}" for word in RUNGS), *(f"2x{word}-noconv" for word in RUNGS),
                   *(f"2x{word} conv+{word}+conv+{word}" for word in ATTENTIONS)])
WITH_STATE = ("rope forgetting 2xwindow mamba mamba2 mamba3 gated-deltanet 2xlinear-fixed "
              "conv+attention hybrid-a")


def powers_of_2(last):
    """Flags of eval.py for the lengths of Table 2, 2^6 to 2^last."""
    return "--sequences 64 --lengths " + " ".join(str(2**k) for k in range(6, last + 1))


EXPERIMENTS = {
    "problem1": {
        "train": [f"--tau 1 5 --model {SIX}"],
        "draw": {
            "{}/problem1/*_tau1_* --name problem1_tau1":
                "One query: Mamba and the hybrids keep it to three times the training length, "
                "rotary attention nearly",
            "{}/problem1/*_tau5_* --name problem1_tau5":
                "One query, its value five tokens later: hybrids that learn it keep it, Mamba "
                "nearly, rotary attention in two of five seeds"}},
    "problem2": {
        "train": ["--M 4 8 16 --model rope mamba hybrid-a hybrid-b"],
        "draw": {
            "{}/problem2/* --name finding":
                "Width 8: rotary attention fades in long contexts, Mamba learns 8 or 16 queries "
                "only in part; Mamba before attention recalls all",
            "{}/problem2/* --panels model --name problem2_models":
                "With more queries rotary attention fades sooner and Mamba learns a smaller part; "
                "the hybrids keep all in the median"}},
    "sixteen": {                                             # beside M = 16 of problem2
        "train": ["--M 16 --model nope learned"]},
    "problem3": {
        "train": ["--d 64 --M 4 8 16 --model mamba", "--d 64 --M 16 --tau 10 --model mamba"],
        "draw": {
            "{}/problem2/mamba_* {}/problem3/*_tau1_* --panels model d --name problem3":
                "At d = 64 Mamba learns the sixteen queries that it does not learn at d = 8",
            "{}/problem3/*_tau10_* --name problem3_tau10":
                "Sixteen queries at delay 10: no Mamba of d = 64 learns them in 20,000 steps"}},
    "page": {
        "train": [f"--L 32 --tau 1 5 --model {SIX}"],
        "test": [("*", "--lengths " + " ".join(map(str, range(97, 129))))],
        "draw": {
            "{}/page/* report/published/page* --panels tau --name page":
                "Trained at 32 tokens: Mamba and the hybrids still recall at 128, attention of "
                "every kind fades"}},
    "table2": {
        "train": ["--d 64 --L 256 --model learned rope",
                  "--d 64 --L 256 --model mamba --lr 8e-3 --batch-size 16 --steps 10000 "
                  "--no-stop-early",
                  "--d 64 --L 256 --model mamba --lr 8e-3 --batch-size 16 --steps 10000 "
                  "--no-stop-early --train-lengths uniform",
                  "--d 64 --L 256 --model mamba --lr 4e-3 --batch-size 4 --steps 40000 "
                  "--no-stop-early --train-lengths uniform"],
        "test": [("mamba*", powers_of_2(20)), ("rope*", powers_of_2(16)),
                 ("learned*", powers_of_2(16))],
        # Of `learned`, only these two seeds learn; chance would hide how they fade.
        "draw": {
            "{}/table2/mamba*steps40000* {}/table2/rope* {}/table2/learned*seed[24].json "
            "report/published/table2.json --name table2":
                "Mamba, trained at mixed lengths up to 256 in batches of 4, recalls after a "
                "million tokens in every seed; attention, trained at 256, fades"}},
    "filter": {
        "train": ["--d 8 16 32 --M 1 4 16 --tau 1 2 3 4 5 10 "
                  "--model conv+attention mamba+attention",
                  "--d 64 --M 4 16 --tau 1 2 3 4 5 10 --model conv+attention",
                  "--d 64 --M 4 16 --tau 4 5 10 --model mamba+attention",
                  "--d 32 64 --M 4 --tau 6 7 8 9 --model mamba+attention",
                  "--d 16 --tau 1 2 3 4 5 7 8 10 --model conv2+attention conv8+attention",
                  "--d 16 32 --M 1 4 --tau 1 2 3 4 5 10 --model mamba-noconv+attention",
                  "--d 8 --M 4 16 --model mamba-noconv+attention",
                  "--d 16 --M 8 16 --model mamba-noconv+attention",
                  "--d 32 --M 16 --tau 1 2 3 4 --model mamba-noconv+attention",
                  "--d 64 --M 4 --tau 1 2 3 4 5 6 7 8 9 10 --model mamba-noconv+attention",
                  "--d 64 --M 16 --tau 1 2 3 4 5 --model mamba-noconv+attention"],
        "draw": {
            "{}/filter/*_d32_* --against tau --name filter":
                "At d = 32 four taps reach three tokens back; with its state, Mamba reaches "
                "further if there are few queries",
            "{}/filter/conv*_M1_*_d16_* --against tau --name filter_taps":
                "2, 4 (conv) and 8 taps reach 1, 3 and 7 tokens back",
            "{}/filter/mamba-noconv*_M4_tau1_* {}/filter/mamba-noconv*_M16_tau1_* "
            "{}/filter/mamba+*_M4_tau5_* {}/filter/mamba+*_M16_tau4_* "
            "--against d --panels M tau --name filter_width":
                "Left: the state alone at delay 1; right: Mamba at delays that its convolution "
                "does not reach. Both need width"}},
    "long": {
        "train": ["--steps 200000 --d 32 --M 16 --tau 4 --model mamba+attention",
                  "--steps 200000 --d 32 --M 4 --tau 10 --model mamba+attention",
                  "--steps 200000 --d 16 --M 16 --model mamba-noconv+attention"]},
    "share": {
        "train": ["--d 32 --M 4 --K 4 64 --tau 1 4 5 10 --model mamba+attention",
                  "--d 32 --M 4 --K 8 --tau 4 5 10 --model mamba+attention",
                  "--d 32 --M 16 --K 32 --tau 4 5 --model mamba+attention",
                  "--d 32 --M 16 --K 64 --tau 1 4 5 10 --model mamba+attention"],
        "draw": {
            "{}/share/*_tau4_* {}/share/*_tau5_* {}/filter/mamba+*_M4_tau4_*_d32_* "
            "{}/filter/mamba+*_M4_tau5_*_d32_* {}/filter/mamba+*_M16_tau4_*_d32_* "
            "{}/filter/mamba+*_M16_tau5_*_d32_* --against K --panels M tau --name share":
                "At delays 4 and 5, Mamba before attention recalls if few of the tokens can be "
                "queries (at K = 4, answering with the commonest token gives 0.39)"}},
    "ladder": {
        "train": [f"--d 16 --M 4 16 --model {LADDER}"],
        "draw": {
            "{}/ladder/* --against model --name ladder":
                "Sixteen queries, with a short convolution: a decay per token keeps more than a "
                "fixed one, the delta rule more still; rotation adds nothing"}},
    "state": {
        "train": [f"--d 8 16 32 --M 16 --model {WITH_STATE}",
                  f"--d 8 16 32 --M 8 --task mqar --model {WITH_STATE}"],
        "draw": {
            "{}/state/*_M16_* --against state --lowest --name state":
                "Sixteen queries: of the states of fixed size, the delta rule keeps the most in "
                "the median; from d = 16 on, Mamba-2 has the best worst seed",
            "{}/state/mqar_* --against state --lowest --name state_mqar":
                "MQAR, eight pairs: selective states and forgetting attention keep them, rotary "
                "attention and a fixed decay do not"}},
    "parity": {
        "train": ["--d 16 --task parity --model rnn lti mamba mamba2 mamba3 gated-deltanet rope "
                  "hybrid-a 2xlinear-rotation"],
        "draw": {
            "{}/parity/* --name parity":
                "Parity: linear states that only shrink lose count; the delta rule with rotation "
                "keeps 0.95 to 192 tokens in five of five seeds, Mamba-3 in two"}},
    "ratio": {
        "train": ["--d 22 --M 16 --model mamba+attention",
                  "--d 16 --M 16 --model 2xmamba+attention",
                  "--d 12 --M 16 --model 3xmamba+attention",
                  "--d 8 --M 16 --model 6xmamba+attention",
                  "--d 4 5 6 7 8 --M 16 --model mamba+attention",
                  "--d 10 12 14 16 --M 16 --model conv+attention"],
        "draw": {
            "{}/ratio/* --against model --name ratio":
                "Sixteen queries: one attention layer is enough beside one to six Mamba layers, "
                "but narrow stacks fail"}},
    "rotary": {
        "train": ["--M 4 16 --model rope 2xrope-fast 2xrope-slow 2xrope-half alibi forgetting"],
        "draw": {
            "{}/rotary/* {}/interpolated/rope-interpolated* --name rotary":
                "Rotating half of the channels keeps more of sixteen queries; other frequencies, "
                "ALiBi and interpolation do not help"}},
    "interpolated": {                                        # then report/interpolate.py, rotary
        "train": ["--M 4 16 --model rope"]},
    "width": {
        "train": ["--M 16 --d 16 32 64 --model rope mamba hybrid-a hybrid-b"],
        "draw": {
            "{}/width/*L64_seed* {}/problem2/*_M16_* --against d --name width":
                "Sixteen queries: from d = 16 on Mamba learns them in the median, at d = 8 it does "
                "not"}},
    "narrow": {
        "train": ["--M 16 --model mamba --steps 200000", "--M 16 --model mamba --batch-size 512",
                  "--M 16 --model mamba --train-lengths uniform",
                  "--M 16 --model 2xmamba-own 2xmamba2-shared"],
        "draw": {
            "{}/narrow/* {}/problem2/mamba_M16_* {}/state/mamba[23]_M16_*_d8_* "
            "{}/state/gated-deltanet_M16_*_d8_* --against model --name narrow":
                "At d = 8, separate channels for keys help Mamba learn sixteen queries, "
                "and Mamba-2 fails without them"}},
    "four": {                                                # the report has seeds 0 to 29
        "train": ["--M 4 --model mamba", "--M 4 --model mamba --train-lengths uniform",
                  "--M 4 --model mamba --batch-size 256", "--M 4 --model mamba --steps 60000"],
        "draw": {
            "{}/four/* --against model --name four":
                "Mixed training lengths: all 30 seeds of Mamba learn four queries and stay above "
                "0.9"}},
    "mixed": {                                               # beside M = 4 of problem2
        "train": ["--M 4 --train-lengths uniform --model rope hybrid-a hybrid-b"]},
    "uniform": {
        "train": [f"--train-lengths uniform --model {SIX}"],
        "draw": {
            "{}/problem1/*_tau1_* {}/uniform/* --panels train_lengths --name uniform":
                "Trained at all lengths up to 64, every model that learns the task also answers in "
                "short contexts"}},
    "family": {
        "train": [f"--d 16 --M 1 16 --model {ALL}"],
        "draw": {
            "{}/family/* --against model --name family":
                "Most models learn one query; of these, only those with a selective state keep "
                "sixteen beyond 64 tokens"}},
    "reference": {                                           # three seeds, to compare machines
        "train": [f"--device cpu --tau 1 5 --model {SIX}",
                  "--device cpu --M 4 --model rope mamba hybrid-a hybrid-b"]},
}
