"""The report of a run, or of several beside each other: one HTML page that needs nothing else, no network least of all.

`collect` reads run directories into plain data, `page` puts that data into `template.html` with the style sheet and
the scripts beside it; what one sees is made by `page.js` from the data, with `charts.js` for the drawings. Imports no
torch.
"""
