"README.md is the site's first page, and its links lead somewhere"
import importlib.util, re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def made() -> tuple[str, dict[str,bytes]]:
    spec = importlib.util.spec_from_file_location('make_readme', ROOT/'tools'/'make_readme.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.readme()


def test_in_sync():
    text, pictures = made()
    assert (ROOT/'README.md').read_text(encoding='utf-8') == text, ("README.md is not what nbs/index.ipynb "
                                                                    "says: python tools/make_readme.py")
    for name, data in pictures.items():
        assert (ROOT/name).read_bytes() == data, f"{name} is out of date: python tools/make_readme.py"


def test_links_lead_somewhere():
    targets = re.findall(r'\]\(([^)\s#]+)', (ROOT/'README.md').read_text(encoding='utf-8'))
    lost = [t for t in targets if not re.match(r'[a-z]+:', t) and not (ROOT/t).exists()]
    assert not lost, f"README.md links to {lost}, which are not there"


def test_says_the_two_commands():
    text = (ROOT/'README.md').read_text(encoding='utf-8')
    assert './run demo' in text and './run test' in text


def test_counts_the_published_models():
    from tokkit.zoo import published_models
    published = published_models()
    text = (ROOT/'README.md').read_text(encoding='utf-8')
    generators = sum(published.kind == 'generator')
    tokenizers = sum(published.kind == 'tokenizer')
    assert f'{tokenizers} tokenizers and {generators} generators of others' in text
    rows = text.partition('| family |')[2].partition('\n\n')[0].splitlines()[2:]
    counted = [sum(int(number) for number in re.findall(r'^\d+', row.split('|')[column].strip()))
               for column in (3, 4) for row in rows]
    assert sum(counted[:len(rows)]) == tokenizers and sum(counted[len(rows):]) == generators
