from ._enclosure import enclose_norm as enclose_norm, Enclosure as Enclosure
