"""The data doctor: what is wrong with preference data, before it costs money. `python -m data_utils.doctor --help`.

examine.py      the whole examination, from paths to a report
texts.py        a pair as plain text; what is suspicious about it (`FLAGS`), shallow cues (`CUES`)
duplicates.py   64-bit hashes, MinHash sketches, near-duplicates within and across sets
lengths.py      percentiles, histograms, what each max_length cuts, what the layouts save
tokens.py       the model's tokenizer: its template's habits, one row token by token
survey.py       the one pass over the rows, which fills arrays of about 200 bytes per row
diagnosis.py    from surveys to the report
findings.py     from numbers to a verdict
report.py       the shape of everything that the doctor says
summary.py      the report on a terminal
page.py         the report as one HTML page, with charts.py and style.py
"""
