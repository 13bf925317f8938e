"""From the text a model writes to reasoning, content and tool calls; and the grammars of the calls.

`OutputParser` (machine.py) is the one hold-back text machine; each tool format is one small file.
"""
