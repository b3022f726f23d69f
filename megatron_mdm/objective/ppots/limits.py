"""Upper limits of the size of a density and of its measurement; without torch, for the flags."""

# Most edges of a table. Checkpoints hold tables padded to this length.
TABLE_SIZE = 1024
# Most equal bins of t. A table has an edge at the centre of each bin, and edges at 0 and 1.
MOST_PPOTS_BINS = TABLE_SIZE - 2
