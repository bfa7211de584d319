// The feature pages: a table of all features of an SAE and a page per feature, read from two Parquet files by ranges.
// Everything shown comes from files that anyone may have written: it is put in as text, never as markup.
"use strict"
;(() => {
  const site = JSON.parse(document.getElementById("site").textContent)
  const { parquetMetadata, parquetMetadataAsync, parquetRead, parquetReadObjects } = hyparquet
  const SHOW = { all: "all features", active: "active", labelled: "labelled", dead: "dead" }
  const ROW = () => parseInt(getComputedStyle(document.documentElement).getPropertyValue("--row"))

  // ---- small things ------------------------------------------------------------------------------------------------

  /** An element with attributes, listeners (`onclick`) and children; strings become text. */
  function el(tag, attributes = {}, ...children) {
    const made = document.createElement(tag)
    for (const [name, value] of Object.entries(attributes)) {
      if (name.startsWith("on")) made.addEventListener(name.slice(2), value)
      else if (name.startsWith("--")) made.style.setProperty(name, value)
      else if (value !== undefined && value !== null && value !== false) made.setAttribute(name, value)
    }
    made.append(...children.flat().filter((child) => child !== null && child !== undefined))
    return made
  }

  function svg(tag, attributes, ...children) {
    const made = document.createElementNS("http://www.w3.org/2000/svg", tag)
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value)
    made.append(...children)
    return made
  }

  const count = (n) => Number(n).toLocaleString("en")
  const short = (n) => (Number(n) >= 1e6 ? `${(n / 1e6).toFixed(1)}M` : Number(n) >= 1e4 ? `${Math.round(n / 1e3)}k` : count(n))
  const known = (x) => x !== null && x !== undefined && !Number.isNaN(x)
  const share = (x) => (!known(x) ? "–" : x > 0 && x < 1e-6 ? `${(x * 100).toExponential(0)} %` : `${Number((x * 100).toPrecision(2))} %`)
  const value = (x) => (!known(x) ? "–" : Math.abs(x) >= 100 ? x.toFixed(0) : Number(x.toPrecision(3)).toString())

  /** A token made visible: line ends, control and direction characters as signs. */
  function visible(token) {
    return String(token ?? "")
      .replace(/\r?\n/g, "⏎")
      .replace(/\t/g, "⇥")
      .replace(/[\u0000-\u001f\u007f]/g, (c) => String.fromCharCode(0x2400 + (c.charCodeAt(0) & 0x1f)))
      .replace(/[\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff]/g, (c) => `‹${c.charCodeAt(0).toString(16)}›`)
  }

  // ---- data --------------------------------------------------------------------------------------------------------

  const folder = (sae) => `reverse-index/${encodeURIComponent(sae.name)}/`

  /** A file read by ranges; the last pieces are kept. A server without ranges sends it whole, once. */
  function remote(url, byteLength) {
    const pieces = new Map()
    let whole = null
    async function get(start, end) {
      if (whole) return whole.slice(start, end)
      const answer = await fetch(url, { headers: { Range: `bytes=${start}-${end - 1}` } })
      if (!answer.ok) throw new Error(`${url}: ${answer.status} ${answer.statusText}`)
      const data = await answer.arrayBuffer()
      if (answer.status === 206) return data
      whole = data
      return whole.slice(start, end)
    }
    return {
      byteLength,
      slice(start, end = byteLength) {
        const key = `${start}-${end}`
        if (!pieces.has(key)) {
          const piece = get(start, end)
          piece.catch(() => pieces.delete(key))
          pieces.set(key, piece)
          if (pieces.size > 16) pieces.delete(pieces.keys().next().value)
        }
        return pieces.get(key)
      },
    }
  }

  async function columns(file, metadata, names) {
    const found = {}
    const present = metadata.schema.map((s) => s.name)
    await parquetRead({
      file,
      metadata,
      columns: names.filter((name) => present.includes(name)),
      onChunk({ columnName, columnData, rowStart }) {
        if (rowStart === 0 && columnData.length === Number(metadata.num_rows)) found[columnName] = columnData
        else {
          found[columnName] ??= new Array(Number(metadata.num_rows))
          for (let i = 0; i < columnData.length; i++) found[columnName][rowStart + i] = columnData[i]
        }
      },
    })
    return found
  }

  const opened = new Map()

  /** The table of an SAE: every column that is shown, as arrays over features. Texts that only the search needs follow. */
  function table(sae) {
    if (!opened.has(sae.name)) {
      const loading = (async () => {
        const answer = await fetch(folder(sae) + "summary.parquet")
        if (!answer.ok) throw new Error(`${folder(sae)}summary.parquet: ${answer.status} ${answer.statusText}`)
        const buffer = await answer.arrayBuffer()
        const file = { byteLength: buffer.byteLength, slice: (start, end) => buffer.slice(start, end) }
        const metadata = parquetMetadata(buffer)
        const shown = ["count", "density", "max", "mean", "purity", "top_token", "label"]
        const data = await columns(file, metadata, shown)
        const n = Number(metadata.num_rows)
        const numbers = (name) => Float64Array.from(data[name] ?? new Array(n), (x) => (known(x) ? Number(x) : NaN))
        const texts = (name) => data[name] ?? new Array(n).fill(null)
        const found = { n, top_token: texts("top_token"), label: texts("label"), features: null, words: null }
        for (const name of ["count", "density", "max", "mean", "purity"]) found[name] = numbers(name)
        found.biggest = found.density.reduce((a, b) => (b > a ? b : a), 0)
        /** One lower-case text per feature: label, tokens, promoted tokens. */
        found.search = async () => {
          if (found.words) return found.words
          const more = await columns(file, metadata, ["top_tokens", "top_logits"])
          const [a, b] = [more.top_tokens ?? [], more.top_logits ?? []]
          found.top_tokens = a
          found.words = Array.from({ length: n }, (_, i) =>
            `${found.label[i] ?? ""}\n${found.top_token[i] ?? ""}\n${a[i] ?? ""}\n${b[i] ?? ""}`.toLowerCase(),
          )
          return found.words
        }
        /** The file with a page per feature, its footer read once. */
        found.pages = () =>
          (found.features ??= (async () => {
            const pages = remote(folder(sae) + "features.parquet", sae.features_bytes)
            return { file: pages, metadata: await parquetMetadataAsync(pages, { initialFetchSize: sae.features_footer }) }
          })().catch((why) => {
            found.features = null
            throw why
          }))
        return found
      })()
      loading.catch(() => opened.delete(sae.name))
      opened.set(sae.name, loading)
    }
    return opened.get(sae.name)
  }

  async function feature(sae, number) {
    const { file, metadata } = await (await table(sae)).pages()
    return (await parquetReadObjects({ file, metadata, rowStart: number, rowEnd: number + 1 }))[0]
  }

  // ---- state: what the address says ----------------------------------------------------------------------------------

  const state = { sae: null, feature: null, q: "", sort: "density", up: false, show: "active", order: [], at: 0 }

  function link(sae, number) {
    const base = `#/sae/${encodeURIComponent(sae.id)}`
    if (number !== undefined && number !== null) return `${base}/feature/${number}`
    const query = new URLSearchParams()
    if (state.q) query.set("q", state.q)
    if (state.sort !== "density" || state.up) query.set("sort", (state.up ? "+" : "-") + state.sort)
    if (state.show !== "active") query.set("show", state.show)
    return query.size ? `${base}?${query}` : base
  }

  function readAddress() {
    const [path, query] = location.hash.replace(/^#\/?/, "").split("?")
    const parts = path.split("/").map((part) => {
      try {
        return decodeURIComponent(part)
      } catch {
        return part
      }
    })
    state.sae = site.saes.find((sae) => parts[0] === "sae" && (sae.id === parts[1] || sae.name === parts[1])) ?? site.saes[0]
    state.feature = parts[2] === "feature" && /^\d{1,9}$/.test(parts[3] ?? "") ? Number(parts[3]) : null
    if (state.feature === null) {
      const wanted = new URLSearchParams(query ?? "")
      state.q = wanted.get("q") ?? ""
      const sort = wanted.get("sort") ?? "-density"
      state.up = sort[0] === "+" || sort[0] === " "
      state.sort = sort.slice(1) in COLUMNS ? sort.slice(1) : "density"
      state.show = wanted.get("show") in SHOW ? wanted.get("show") : "active"
    }
  }

  function writeAddress() {
    try {
      history.replaceState(null, "", link(state.sae))
    } catch {
      // a sandboxed page may not; the address then stays as it was
    }
  }

  // ---- sorting and searching -------------------------------------------------------------------------------------------

  const COLUMNS = {
    feature: { title: "feature", text: false },
    label: { title: "label, or its tokens", text: true, css: "mid-col" },
    top_token: { title: "top token", text: true },
    density: { title: "density", css: "r" },
    max: { title: "max", css: "r mid-col" },
    count: { title: "count", css: "r wide" },
    mean: { title: "mean", css: "r wide" },
    purity: { title: "purity", css: "r wide" },
  }
  const RULE = /^(feature|density|max|count|mean|purity)(<=|>=|<|>|=)(-?[\d.]+(?:e-?\d+)?)(%?)$/i
  const TEST = {
    "<": (a, b) => a < b, ">": (a, b) => a > b, "<=": (a, b) => a <= b, ">=": (a, b) => a >= b, "=": (a, b) => a === b,
  }

  async function selection(data) {
    const rules = []
    const words = []
    for (const word of state.q.trim().split(/\s+/).filter(Boolean)) {
      const rule = RULE.exec(word)
      if (rule) rules.push({ name: rule[1].toLowerCase(), test: TEST[rule[2]], limit: rule[3] / (rule[4] ? 100 : 1) })
      else words.push(word.toLowerCase())
    }
    const number = /^#?\d+$/.test(state.q.trim()) ? Number(state.q.trim().replace("#", "")) : -1
    const texts = words.length && number < 0 ? await data.search() : null
    const found = []
    for (let i = 0; i < data.n; i++) {
      if (number >= 0) {
        if (i === number || (String(i).startsWith(String(number)) && state.q.length > 1)) found.push(i)
        continue
      }
      if (state.show === "active" ? !(data.count[i] > 0) : state.show === "dead" ? data.count[i] > 0 : false) continue
      if (state.show === "labelled" && !data.label[i]) continue
      if (!rules.every((rule) => rule.test(rule.name === "feature" ? i : data[rule.name][i], rule.limit))) continue
      if (texts && !words.every((word) => texts[i].includes(word))) continue
      found.push(i)
    }
    const sign = state.up ? 1 : -1
    const by = data[state.sort]
    if (number >= 0) return found.sort((a, b) => a - b)
    if (state.sort === "feature") return state.up ? found : found.reverse()
    if (COLUMNS[state.sort].text)
      return found.sort((a, b) => !by[a] - !by[b] || -sign * (by[a] < by[b] ? -1 : by[a] > by[b] ? 1 : 0) || a - b)
    return found.sort((a, b) => (by[a] === by[b] ? a - b : Number.isNaN(by[a]) ? 1 : Number.isNaN(by[b]) ? -1 : sign * (by[a] - by[b])))
  }

  // ---- the table -------------------------------------------------------------------------------------------------------

  let view = null // what is on the screen: { kind, keys, ... }

  function top(extra) {
    const sae = state.sae
    const choose = el(
      "select",
      { class: "sae", "aria-label": "SAE", onchange: (event) => (location.hash = link(site.saes[event.target.value])) },
      site.saes.map((one, i) => el("option", { value: i, selected: one === sae }, one.id)),
    )
    const facts = [
      sae.base_model, sae.hook, sae.architecture && `${sae.architecture}${sae.k ? ` k=${sae.k}` : ""}`,
      `${count(sae.d_sae)} features, ${count(sae.n_active)} active`,
      `${short(sae.n_tokens)} tokens${sae.scope && sae.scope !== "all" ? ` (${sae.scope})` : ""}`,
    ]
    return el(
      "header",
      { class: "top" },
      el("div", { class: "line" }, el("h1", {}, site.title), site.saes.length > 1 ? choose : el("span", {}, sae.id),
        el("span", { class: "facts" }, facts.filter(Boolean).join(" · "))),
      extra,
    )
  }

  async function showTable() {
    const sae = state.sae
    document.title = `${sae.id} · ${site.title}`
    const search = el("input", {
      type: "search", "aria-label": "Search", placeholder: "a token, a label, a number, or density<1% purity>0.9", value: state.q,
      spellcheck: "false", autocapitalize: "off", autocomplete: "off",
    })
    search.value = state.q
    const show = el("select", { "aria-label": "Which features" },
      Object.entries(SHOW).map(([name, title]) => el("option", { value: name, selected: name === state.show }, title)))
    const total = el("span", { class: "quiet num" })
    const help = el("button", { class: "plain hint", onclick: () => keysDialog() }, "?")
    const heads = Object.entries(COLUMNS).map(([name, { title, css }]) =>
      el("button", { class: `${css ?? ""} ${name === "feature" ? "id" : ""}`, "data-sort": name, onclick: () => sortBy(name) }, title))
    const head = el("div", { class: "head cells" }, heads)
    const rows = el("div", { class: "rows" })
    const scroll = el("div", { class: "scroll", tabindex: "-1" }, rows)
    document.body.replaceChildren(
      top(el("div", { class: "controls" }, search, show, total, help)),
      el("main", { class: "grid" }, head, scroll),
    )
    view = { kind: "table", search }
    const mine = view
    const data = await table(sae)
    if (view !== mine) return

    function draw() {
      const height = ROW()
      head.style.marginRight = `${scroll.offsetWidth - scroll.clientWidth}px` // the scrollbar
      const first = Math.max(0, Math.floor(scroll.scrollTop / height) - 8)
      const last = Math.min(state.order.length, Math.ceil((scroll.scrollTop + scroll.clientHeight) / height) + 8)
      rows.style.height = `${state.order.length * height}px`
      const made = []
      for (let place = first; place < last; place++) made.push(row(data, place, height))
      if (!state.order.length) made.push(el("p", { class: "empty" }, "Nothing fits."))
      rows.replaceChildren(...made)
    }

    function row(data, place, height) {
      const i = state.order[place]
      const dead = !(data.count[i] > 0)
      const width = dead ? 0 : Math.sqrt(data.density[i] / (data.biggest || 1)).toFixed(3)
      const made = el(
        "a", { class: `row cells${place === state.at ? " on" : ""}${dead ? " dead" : ""}`, href: link(sae, i) },
        el("span", { class: "id num" }, String(i)),
        data.label[i] ? el("span", { class: "mid-col" }, data.label[i])
          : el("span", { class: "mid-col quiet" }, dead ? "never fires" : visible(data.top_tokens?.[i] || data.top_token?.[i])),
        el("span", { class: "tok" }, data.label[i] && innerWidth <= 640 ? data.label[i] : visible(data.top_token[i])),
        el("span", { class: "r num bar" }, el("i", { "--w": width }), el("b", {}, dead ? "–" : share(data.density[i]))),
        el("span", { class: "r num mid-col" }, dead ? "–" : value(data.max[i])),
        el("span", { class: "r num wide" }, dead ? "–" : short(data.count[i])),
        el("span", { class: "r num wide" }, dead ? "–" : value(data.mean[i])),
        el("span", { class: "r num wide" }, dead || !known(data.purity[i]) ? "–" : data.purity[i].toFixed(2)),
      )
      made.style.top = `${place * height}px`
      return made
    }

    async function refresh(keep) {
      const order = await selection(data)
      if (view !== mine) return
      state.order = order
      state.at = keep ? Math.max(0, Math.min(state.at, order.length - 1)) : 0
      total.textContent = `${count(order.length)} of ${count(data.n)}`
      for (const one of heads) {
        const on = one.dataset.sort === state.sort
        if (on) one.setAttribute("aria-sort", state.up ? "ascending" : "descending")
        else one.removeAttribute("aria-sort")
        one.textContent = COLUMNS[one.dataset.sort].title + (on ? (state.up ? " ↑" : " ↓") : "")
      }
      if (!keep) scroll.scrollTop = 0
      draw()
    }

    function sortBy(name) {
      state.up = state.sort === name ? !state.up : name === "feature" || COLUMNS[name].text
      state.sort = name
      writeAddress()
      refresh()
    }

    function move(step) {
      state.at = Math.max(0, Math.min(state.order.length - 1, state.at + step))
      const height = ROW()
      const [above, below] = [state.at * height, (state.at + 1) * height]
      if (above < scroll.scrollTop) scroll.scrollTop = above
      else if (below > scroll.scrollTop + scroll.clientHeight) scroll.scrollTop = below - scroll.clientHeight
      draw()
    }

    search.addEventListener("input", () => {
      state.q = search.value
      writeAddress()
      refresh()
    })
    show.addEventListener("change", () => {
      state.show = show.value
      writeAddress()
      refresh()
    })
    scroll.addEventListener("scroll", () => requestAnimationFrame(draw), { passive: true })
    view.resize = draw
    view.keys = {
      j: () => move(1), k: () => move(-1), ArrowDown: () => move(1), ArrowUp: () => move(-1),
      Enter: () => state.order.length && (location.hash = link(sae, state.order[state.at])),
      o: () => state.order.length && (location.hash = link(sae, state.order[state.at])),
      Escape: () => {
        if (!state.q) return search.blur()
        search.value = state.q = ""
        writeAddress()
        refresh()
      },
    }
    await refresh(true)
    move(0)
    document.body.dataset.ready = "table"
    // what the next clicks need, while nobody waits
    setTimeout(() => view === mine && data.search().then(() => (view === mine && draw(), data.pages())).catch(() => {}), 100)
  }

  // ---- one feature -----------------------------------------------------------------------------------------------------

  function tokens(example, scale) {
    return el("p", { class: "toks" },
      Array.from(example.tokens ?? [], (token, i) => {
        const v = example.values?.[i] ?? 0
        const part = { class: `${v > 0 ? "lit" : v < 0 ? "neg" : ""}${i === example.center ? " mid" : ""}` }
        if (v) Object.assign(part, { "--a": (0.1 + 0.7 * Math.min(1, Math.abs(v) / scale)).toFixed(3), "data-v": value(v), title: value(v) })
        const text = visible(token)
        return el("span", part, /[⏎⇥‹␀-␡]/.test(text) ? el("span", { class: "ghost" }, text) : text)
      }))
  }

  function example(one, scale) {
    const from = [
      known(one.role) && `${one.role}${known(one.turn) ? ` turn ${one.turn}` : ""}`,
      one.position >= 0 && `position ${one.position}`, Number(one.sample_id) >= 0 && `sample ${one.sample_id}`,
      known(one.quantile) && `stronger than ${(one.quantile * 100).toFixed(one.quantile > 0.99 ? 1 : 0)} % of its firings`,
    ]
    return el("div", { class: "ex" }, el("div", { class: "v" }, value(one.value)), tokens(one, scale),
      el("div", { class: "from" }, from.filter(Boolean).join(" · ")))
  }

  function contexts(page) {
    const all = Array.from(page.examples ?? [])
    const scale = Math.max(...all.map((one) => Math.abs(one.value)), Math.abs(page.max ?? 0)) || 1
    const of = (kind) => all.filter((one) => one.kind === kind)
    const groups = [["Strongest tokens", of("token")], ["More prompts", of("prompt")]]
    const drawn = of("sample")
    const bands = [[0.75, 2, "upper quarter"], [0.5, 0.75, "third quarter"], [0.25, 0.5, "second quarter"], [-1, 0.25, "lowest quarter"]]
    for (const [low, high, title] of bands)
      groups.push([`Drawn at random: ${title}`, drawn.filter((one) => known(one.quantile) && one.quantile >= low && one.quantile < high)])
    groups.push(["Drawn at random", drawn.filter((one) => !known(one.quantile))])
    groups.push(["Examples", all.filter((one) => !["token", "prompt", "sample"].includes(one.kind))])
    return groups.filter(([, list]) => list.length).map(([title, list]) =>
      el("section", {}, el("h3", {}, title), list.map((one) => example(one, scale))))
  }

  function histogram(page, sae) {
    const bins = Array.from(page.histogram ?? [], Number)
    const first = bins.findIndex((n) => n > 0)
    if (first < 0) return null
    let last = bins.length - 1
    while (!bins[last]) last--
    const [from, to] = [Math.max(0, first - 1), Math.min(bins.length - 1, last + 1)]
    const [width, height, foot] = [368, 92, 16]
    const step = width / (to - from + 1)
    const most = Math.max(...bins)
    const edge = (i) => sae.bin_edges?.[i] ?? 2 ** ((i - 32) / 2)
    const made = svg("svg", { class: "hist", viewBox: `0 0 ${width} ${height + foot}`, role: "img", "aria-label": "How strongly it fires" })
    for (let i = from; i <= to; i++) {
      const h = bins[i] ? Math.max(1.5, (bins[i] / most) * (height - 6)) : 0
      made.append(svg("rect", { x: (i - from) * step + 0.5, y: height - h, width: Math.max(1, step - 1), height: h, rx: 1.5 },
        svg("title", {}, `${value(edge(i))} to ${value(edge(i + 1))}: ${count(bins[i])}`)))
    }
    made.append(svg("line", { x1: 0, x2: width, y1: height, y2: height }))
    for (const [i, anchor] of [[from, "start"], [Math.round((from + to) / 2), "middle"], [to + 1, "end"]])
      made.append(svg("text", { x: (i - from) * step, y: height + 12, "text-anchor": anchor }, value(edge(i))))
    return el("section", {}, el("h3", {}, "How strongly it fires", el("small", {}, `${count(page.count)} tokens, log scale`)), made)
  }

  function logits(page) {
    const side = (list, css) => {
      const most = Math.max(...list.map((one) => Math.abs(one.value)), 1e-9)
      return el("div", {}, list.map((one) =>
        el("div", { class: `pair ${css}`, "--w": `${(Math.abs(one.value) / most) * 100}%` },
          el("span", { class: "tok" }, visible(one.token)), el("span", { class: "num quiet" }, value(one.value)))))
    }
    const [up, down] = [Array.from(page.top_logits ?? []), Array.from(page.bottom_logits ?? [])]
    if (!up.length && !down.length) return null
    return el("section", {}, el("h3", {}, "What it makes likelier", el("small", {}, "and less likely")),
      el("div", { class: "pairs" }, side(up, ""), side(down, "neg")))
  }

  function neighbours(title, note, list, sae, data) {
    const all = Array.from(list ?? [])
    if (!all.length) return null
    const most = Math.max(...all.map((one) => Math.abs(one.value)), 1e-9)
    return el("section", {}, el("h3", {}, title, el("small", {}, note)), all.map((one) =>
      el("a", { class: `pair ${one.value < 0 ? "neg" : ""}`, "--w": `${(Math.abs(one.value) / most) * 100}%`, href: link(sae, one.feature) },
        el("b", { class: "num" }, String(one.feature)),
        data.label[one.feature] ? el("span", {}, data.label[one.feature])
          : data.count[one.feature] > 0 ? el("span", { class: "tok" }, visible(data.top_token[one.feature]))
          : el("span", { class: "quiet" }, "never fires"),
        el("span", { class: "num quiet" }, one.value.toFixed(2)))))
  }

  function snippet(title, code) {
    const copy = el("button", { class: "plain", onclick: async () => {
      try {
        await navigator.clipboard.writeText(code)
      } catch {
        getSelection().selectAllChildren(text)
        document.execCommand("copy")
      }
      copy.textContent = "copied"
      setTimeout(() => (copy.textContent = "copy"), 1200)
    } }, "copy")
    const text = el("pre", {}, code)
    return el("section", {}, el("h3", {}, title), el("div", { class: "snippet" }, text, copy))
  }

  /** A Python string literal. */
  const quoted = (text) => JSON.stringify(text).replace(/[\u007f-\uffff]/g, (c) => `\\u${c.charCodeAt(0).toString(16).padStart(4, "0")}`)

  function snippets(page, sae) {
    const repo = quoted(repository())
    const load = `from hubsae import HubSAE\n\nsae = HubSAE.from_pretrained(${repo}, ${quoted(sae.id)})\n`
    const n = Number(page.feature)
    return [
      snippet("Read it", `${load}with sae.attach(model) as acts:\n    model(**batch)\nstrength = acts.dense()[..., ${n}]\n`),
      snippet("Steer with it", `${load}with sae.steer(model, feature=${n}, strength=${value(page.max || 1)}, unit=False):\n    model.generate(**batch, max_new_tokens=40)\n`),
    ]
  }

  /** The repo that the page stands in: as it was built, or read off the address on a hub. */
  function repository() {
    const parts = location.pathname.split("/").map(decodeURIComponent)
    const at = parts.indexOf("resolve")
    return at >= 2 ? parts.slice(at - 2, at).join("/") : site.repo || "OWNER/NAME"
  }

  async function showFeature() {
    const { sae, feature: number } = state
    document.title = `Feature ${number} · ${sae.id}`
    const main = el("main", { class: "feature", tabindex: "-1" }, el("p", { class: "quiet" }, "Reading…"))
    document.body.replaceChildren(top(null), main)
    view = { kind: "feature" }
    const mine = view
    const back = () => (location.hash = link(sae))
    view.keys = { Escape: back, u: back, v: () => main.classList.toggle("values") }
    const data = await table(sae)
    if (!state.order.length || state.ordered !== sae) {
      state.order = await selection(data)
      state.ordered = sae
    }
    const place = state.order.indexOf(number)
    const neighbour = (step) => (place >= 0 ? state.order[place + step] : number + step)
    const go = (step) => {
      const next = neighbour(step)
      if (next >= 0 && next < data.n) {
        if (place >= 0) state.at = place + step
        location.replace(link(sae, next))
      }
    }
    view.keys = { ...view.keys, j: () => go(1), k: () => go(-1), ArrowRight: () => go(1), ArrowLeft: () => go(-1) }
    if (number >= data.n) throw new Error(`${sae.id} has ${count(data.n)} features; there is no ${count(number)}`)
    const page = await feature(sae, number)
    if (view !== mine) return
    if (place >= 0) state.at = place

    const labels = Array.from(page.labels ?? [])
    const dead = !(Number(page.count) > 0)
    const tile = (text, name, title) => el("div", { class: "tile", title }, el("b", {}, text), el("span", {}, name))
    const tiles = [
      tile(share(page.density), "of tokens", `${count(page.count)} tokens of ${count(sae.n_tokens)}`),
      tile(count(page.count), "firings"), tile(value(page.max), "maximum"), tile(value(page.mean), "mean where it fires"),
    ]
    if (known(page.purity)) tiles.push(tile(page.purity.toFixed(2), "purity", "Share of its strongest tokens that are the same token"))
    if (!dead && known(page.position_0_share)) tiles.push(tile(share(page.position_0_share), "at position 0"))
    if (!dead && known(page.special_share)) tiles.push(tile(share(page.special_share), "on special tokens"))
    const step = (text, by, title) => el("button", { class: "plain", title, "aria-label": title, onclick: () => go(by) }, text)
    main.replaceChildren(
      el("div", { class: "title" }, el("a", { href: link(sae) }, "← all"), el("h2", {}, `Feature ${number}`),
        el("span", { class: "steps" },
          el("button", { class: "plain", title: "Show the value of every token (v)", onclick: () => main.classList.toggle("values") }, "values"),
          step("↑", -1, "Previous feature (k)"), step("↓", 1, "Next feature (j)"))),
      el("p", { class: "label" }, labels[0]?.text ?? el("span", { class: "quiet" }, dead ? "It never fires on these tokens." : "No label yet.")),
      el("div", { class: "tiles" }, tiles),
      el("div", { class: "cols" },
        el("div", {}, contexts(page), dead ? el("p", { class: "quiet" }, "No examples.") : null),
        el("aside", {}, histogram(page, sae), logits(page),
          neighbours("Nearest directions", "cosine of decoder rows", page.neighbours, sae, data),
          neighbours("Fires together with", "cosine of firings", page.cofiring, sae, data),
          labels.length ? el("section", {}, el("h3", {}, "Labels"), el("ul", { class: "labels" }, labels.map((one) =>
            el("li", {}, one.text, " ", el("span", { class: "quiet" },
              [one.author, one.method, known(one.score) && `score ${one.score.toFixed(2)}`].filter(Boolean).join(", ")))))) : null,
          snippets(page, sae))),
    )
    main.scrollTop = 0
    main.focus({ preventScroll: true })
    document.body.dataset.ready = `feature ${number}`
  }

  // ---- keys, errors, start ---------------------------------------------------------------------------------------------

  function keysDialog() {
    const key = (names, text) => [el("dt", {}, names.map((name) => [el("kbd", {}, name), " "]).flat()), el("dd", {}, text)]
    const dialog = el("dialog", { onclose: () => dialog.remove(), onclick: (event) => event.target === dialog && dialog.close() },
      el("h3", {}, "Keys"),
      el("dl", {}, key(["j", "k"], "next, previous"), key(["Enter"], "open the feature"), key(["/"], "search"),
        key(["v"], "values of tokens"), key(["Esc"], "back; in the table: clear the search"), key(["?"], "this")),
      el("p", { class: "quiet" }, "The search takes words (in labels, tokens and promoted tokens), a feature's number, and rules on feature, density, max, count, mean and purity, like density<1% or purity>0.9."),
      el("form", { method: "dialog" }, el("button", { class: "plain" }, "close")))
    document.body.append(dialog)
    dialog.showModal()
  }

  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || document.querySelector("dialog[open]")) return
    const typing = event.target.matches?.("input, select, textarea")
    if (typing && !["Escape", "Enter", "ArrowDown", "ArrowUp"].includes(event.key)) return
    if (event.target.matches?.("select") || (event.key === "Enter" && event.target.matches?.("a, button"))) return
    if (event.key === "?") return keysDialog()
    if (event.key === "/") {
      event.preventDefault()
      if (view?.search) return view.search.focus()
      state.focus = true
      location.hash = link(state.sae)
      return
    }
    const action = view?.keys?.[event.key]
    if (!action) return
    event.preventDefault()
    action()
    if (typing && event.key === "Escape") event.target.blur()
  })

  function explain(why) {
    const main = el("main", { class: "error" }, el("h2", {}, "This cannot be shown"), el("p", {}, why.message || String(why)),
      el("p", { class: "quiet" }, "The page reads the files beside it over HTTP. If they were made anew, build the page anew as well: hubsae view --build."))
    document.body.replaceChildren(site.saes.length ? top(null) : "", main)
    document.body.dataset.ready = "error"
  }

  async function render() {
    delete document.body.dataset.ready
    if (!site.saes.length) return explain(new Error("There is no index in this release."))
    const before = state.sae
    readAddress()
    if (before !== state.sae) Object.assign(state, { order: [], at: 0 })
    try {
      await (state.feature === null ? showTable() : showFeature())
      if (state.focus && view.search) view.search.focus()
      state.focus = false
    } catch (why) {
      explain(why)
    }
  }

  addEventListener("hashchange", render)
  addEventListener("resize", () => view?.resize?.())
  render()
})()
