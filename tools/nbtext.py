"Print a notebook as text for `git diff`: the cells' sources, each under its id; no outputs"
import json, sys

for cell in json.load(open(sys.argv[1], encoding='utf-8'))['cells']:
    tags = cell['metadata'].get('tags', [])
    print(f"# %% {cell['cell_type']} {cell.get('id', '')} {' '.join(tags)}".rstrip())
    print(''.join(cell['source']), end='\n\n')
