"""The SQL statements of ``prepare/plan/planner.py``, in the order in which they run.

Legend of the columns: pos = source index * 2^40 + line; g, t = 64-bit hashes of the group and of (category, title
key), NULL where the title is too generic; root = the smallest hash of a component, which names it; unrated = the item
has no target and can be scored only, so that neither windows nor the sizes of splits count it.
"""

ROWS = """CREATE TABLE rows AS SELECT * FROM read_csv({files}, auto_detect=false, header=false, delim='\t', quote='',
    escape='', nullstr='\x01', new_line='\\n', buffer_size=8388608, max_line_size=1048576, columns={{
    'pos': 'UBIGINT', 'category': 'VARCHAR', 'reason': 'VARCHAR', 'id': 'VARCHAR', 'rating': 'DOUBLE',
    'rating_count': '{count}', 'image': 'VARCHAR', 'id_hash': 'UBIGINT', 'g': 'UBIGINT', 't': 'UBIGINT'}})"""

# Every statement joins at most two large tables: several joins share the memory and fail instead of spilling.

# Among records that pass the rules, the first of an id in the order of the sources wins.
ITEMS = """CREATE TABLE dups AS SELECT pos FROM rows JOIN (
    SELECT id_hash, min(pos) AS first FROM rows WHERE reason IS NULL GROUP BY id_hash HAVING count(*) > 1
    ) USING (id_hash) WHERE reason IS NULL AND pos <> first;
CREATE TABLE categories AS SELECT category, row_number() OVER (ORDER BY category) AS c FROM (
    SELECT DISTINCT category FROM rows WHERE reason IS NULL);
CREATE TABLE items AS SELECT pos, c, rating IS NULL AS unrated, rating_count, id_hash, g, t
    FROM rows JOIN categories USING (category) ANTI JOIN dups USING (pos) WHERE reason IS NULL;"""

# Only titles that several groups share can join groups; min(g) <> max(g) finds them without counting distinct ones.
LINKS = """CREATE TABLE shared AS SELECT t FROM items WHERE t IS NOT NULL GROUP BY t HAVING min(g) <> max(g);
CREATE TABLE edges AS SELECT DISTINCT g, t FROM items SEMI JOIN shared USING (t);
CREATE TABLE label AS SELECT DISTINCT g, g AS l FROM edges;"""

# Every group takes the smallest label that shares a title with it, then that label's own label (pointer jumping:
# a chain of n groups needs about log n rounds instead of n).
SPREAD = """CREATE OR REPLACE TABLE by_title AS SELECT t, min(l) AS l FROM edges JOIN label USING (g) GROUP BY t;
CREATE OR REPLACE TABLE near AS SELECT g, min(l) AS l FROM edges JOIN by_title USING (t) GROUP BY g;
CREATE OR REPLACE TABLE next AS SELECT near.g AS g, least(near.l, coalesce(far.l, near.l)) AS l
    FROM near LEFT JOIN near AS far ON far.g = near.l;"""

ROOTS = """CREATE TABLE base AS SELECT g, min(least(g, coalesce(t, g))) AS root FROM items GROUP BY g;
CREATE TABLE linked AS SELECT l, min(root) AS root FROM label JOIN base USING (g) GROUP BY l;
CREATE TABLE joined AS SELECT g, root FROM label JOIN linked USING (l);
CREATE TABLE roots AS SELECT base.g AS g, coalesce(joined.root, base.root) AS root
    FROM base LEFT JOIN joined USING (g);"""

# One total order per category: its two ends never share a listing, and ties are always resolved the same way.
WINDOW = """CREATE TABLE chosen AS SELECT pos, g, false AS unrated FROM (
    SELECT pos, g, c, row_number() OVER (PARTITION BY c ORDER BY rating_count DESC, id_hash) AS place FROM items
        WHERE NOT unrated
    ) JOIN (SELECT c, count(*) AS n FROM items WHERE NOT unrated GROUP BY c) USING (c)
    WHERE place <= {top} OR place > n - {bottom};
INSERT INTO chosen SELECT pos, g, true FROM items WHERE unrated;"""

ALL = "CREATE VIEW chosen AS SELECT pos, g, unrated FROM items"

# listings: all of a group; items: those with a target.
GROUPS = """CREATE TABLE taken AS SELECT g, count(*) AS listings, count(*) FILTER (NOT unrated) AS items
    FROM chosen GROUP BY g;
CREATE TABLE members AS SELECT g, root, listings, items FROM taken JOIN roots USING (g);
CREATE TABLE groups AS SELECT root, sum(listings)::BIGINT AS listings, sum(items)::BIGINT AS items
    FROM members GROUP BY root;"""

PICKED = """CREATE TABLE member_sides AS SELECT g, root, split FROM members JOIN sides USING (root);
CREATE TABLE placed AS SELECT pos, root, split FROM chosen JOIN member_sides USING (g);
CREATE TABLE picked AS SELECT pos, id, category, rating, rating_count, image, root,
    CASE WHEN rating IS NULL THEN 'predict' ELSE split END AS split
    FROM rows JOIN placed USING (pos) ORDER BY pos;"""

# Every stratum (category, half star) is spread evenly over (0, 1), in the order of a hash of the id, and the training
# listings are taken from below: a smaller sample is part of a larger one, and no stratum is off by more than one.
SAMPLE = """CREATE TABLE trained AS SELECT pos, c, id_hash FROM items
    SEMI JOIN (SELECT pos FROM picked WHERE split = 'train') USING (pos);
CREATE TABLE strata AS SELECT pos, c, floor(2 * rating) AS stars, id_hash FROM trained JOIN picked USING (pos);
CREATE TABLE spread AS SELECT pos, id_hash, (place - 0.5::DOUBLE) / n AS height FROM (
    SELECT *, row_number() OVER (PARTITION BY c, stars ORDER BY id_hash) AS place FROM strata
    ) JOIN (SELECT c, stars, count(*) AS n FROM strata GROUP BY ALL) USING (c, stars);
CREATE TABLE sampled AS SELECT pos FROM (
    SELECT pos, row_number() OVER (ORDER BY height, id_hash) AS place FROM spread) WHERE place <= {sample};
CREATE TABLE left_out AS SELECT pos FROM trained ANTI JOIN sampled USING (pos);
CREATE OR REPLACE TABLE picked AS SELECT * FROM picked ANTI JOIN left_out USING (pos) ORDER BY pos;
CREATE OR REPLACE TABLE groups AS SELECT root, count(*)::BIGINT AS listings FROM picked GROUP BY root;"""

SELECTION = """COPY (SELECT id, category, rating, rating_count, image,
    lpad(lower(to_hex(root)), 16, '0') AS "group", split FROM picked ORDER BY pos)
    TO {file} (FORMAT parquet, COMPRESSION zstd, ROW_GROUP_SIZE 20480)"""

SUMMARY = """SELECT category, what, sum(n)::BIGINT FROM (
    SELECT category, reason AS what, count(*) AS n FROM rows WHERE reason IS NOT NULL GROUP BY ALL
    UNION ALL SELECT category, 'duplicate_id', count(*) FROM rows SEMI JOIN dups USING (pos) GROUP BY ALL
    UNION ALL SELECT category, 'not_selected', count(*) FROM items JOIN categories USING (c) GROUP BY ALL
    UNION ALL SELECT category, 'not_selected', -count(*) FROM picked GROUP BY ALL
    UNION ALL SELECT category, split, count(*) FROM picked GROUP BY ALL
    ) GROUP BY ALL HAVING sum(n) <> 0 ORDER BY category NULLS FIRST, what"""
