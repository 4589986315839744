"How the tests check tokkit's signatures: beartype, with whole numbers welcome where a float is asked for"
from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
