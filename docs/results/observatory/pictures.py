def draw(n,o): pass
def interactive(n): return ""
