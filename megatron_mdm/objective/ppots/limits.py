"""How large a density and its measurement may be; without torch, which settings do not import."""

# Most edges of a table: checkpoints hold tables of this length, padded.
TABLE_SIZE = 1024
# Most equal bins of t: a table has an edge at each of their centres, and at 0 and 1.
MOST_PPOTS_BINS = TABLE_SIZE - 2
