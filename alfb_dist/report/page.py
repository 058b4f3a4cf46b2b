"""The frame of report.html: style, script and document in one page."""

from __future__ import annotations

from html import escape

_STYLE = """
:root{--page:#f6f6f3;--card:#fff;--ink:#1d1d1b;--muted:#6d6c66;--grid:#e7e6e1;--edge:#e3e2dc;--main:#2563c9;
--second:#d9622b;--thin:#8c8b84;--plate:#faf9f6}
@media (prefers-color-scheme:dark){:root{--page:#121211;--card:#1b1b19;--ink:#ecebe6;--muted:#a3a29a;--grid:#30302d;
--edge:#2b2b28;--main:#6ea5ff;--second:#ff9b61;--thin:#8a8982;--plate:#20201e}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif}
main{max-width:1220px;margin:0 auto;padding:32px 24px 56px}
h1{font-size:28px;line-height:1.2;margin:0 0 4px;letter-spacing:-.01em}
h2{font-size:19px;margin:38px 0 12px}
h3{font-size:15.5px;margin:0}h4{font-size:13px;font-weight:600;margin:0 0 2px;padding-left:4px}
header p,figcaption p{color:var(--muted);margin:2px 0 0}
figcaption p{font-size:13.5px;max-width:120ch}
.facts{margin-top:10px;display:flex;flex-wrap:wrap;gap:2px 20px;font-size:13.5px}
.facts span{color:var(--muted)}.facts b{font-weight:600;color:var(--ink)}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(180px,1fr));gap:12px;margin:24px 0 0}
.tile{background:var(--card);border:1px solid var(--edge);border-radius:10px;padding:12px 16px}
.tile span,.tile small{display:block;color:var(--muted);font-size:13px}
.tile b{display:block;font-size:23px;line-height:1.35;font-weight:650;font-variant-numeric:tabular-nums}
.cards{display:grid;grid-template-columns:repeat(2,minmax(0,1fr));gap:14px}
.card{margin:0;background:var(--card);border:1px solid var(--edge);border-radius:10px;padding:16px 16px 10px;
min-width:0}
.wide{grid-column:1/-1}
@media (max-width:760px){.cards{grid-template-columns:minmax(0,1fr)}main{padding:20px 12px}}
svg{display:block;width:100%;height:auto;margin-top:6px;overflow:visible}
.legend{display:flex;flex-wrap:wrap;gap:2px 18px;margin-top:8px;font-size:13px;color:var(--muted);align-items:center}
.key{display:inline-block;width:18px;height:3px;border-radius:2px;margin-right:7px;vertical-align:middle;background:var(--main)}
.key.second,.key.dots,.key.above{background:var(--second)}.key.thin{background:var(--thin);opacity:.6}
.key.dots{width:9px;height:9px;border-radius:50%}
.key.inner,.key.outer{height:11px;opacity:.38}.key.outer{opacity:.16}
.ramp{display:inline-block;width:220px;height:12px;border-radius:3px;border:1px solid var(--edge)}
.ramp-key{gap:2px 10px}.ramp-key span:last-child{margin-left:14px}
.grid{stroke:var(--grid);stroke-width:1}.base{stroke:var(--muted);stroke-width:1;opacity:.6}
.tick{fill:var(--muted);font-size:11.5px;font-variant-numeric:tabular-nums}.axis{fill:var(--muted);font-size:12px}
.end{text-anchor:end}.mid{text-anchor:middle}
.reference{stroke:var(--muted);stroke-width:1.2;stroke-dasharray:5 4}
.line{fill:none;stroke:var(--main);stroke-width:1.8;stroke-linejoin:round;stroke-linecap:round}
.line.second,.line.dots path,.line.above{stroke:var(--second)}
.dots circle{fill:var(--second);stroke:var(--card);stroke-width:1}
.line.thin{stroke:var(--thin);stroke-width:1}.dots path{fill:none;stroke-width:1;opacity:.6}
.line.bias{stroke-width:1.3;opacity:.75}.line.bias:hover{stroke-width:3;opacity:1}
.band{fill:var(--main);opacity:.16}.band.inner{opacity:.28}
.plate{fill:var(--plate);stroke:var(--grid)}.heat{image-rendering:pixelated;cursor:crosshair}
.panels{display:grid;grid-template-columns:repeat(auto-fit,minmax(260px,1fr));gap:14px 12px;margin-top:12px}
.empty{color:var(--muted);padding:18px 0}
details{margin-top:14px}summary{cursor:pointer;color:var(--main);font-size:14px}
table{border-collapse:collapse;font-size:13px;margin-top:10px}
td{padding:2px 18px 2px 0;vertical-align:top;overflow-wrap:anywhere}td:first-child{color:var(--muted)}
.cursor{stroke:var(--muted);stroke-width:1;pointer-events:none}
#tip{position:fixed;display:none;pointer-events:none;background:var(--ink);color:var(--page);border-radius:6px;
padding:5px 9px;font-size:12.5px;line-height:1.4;white-space:pre;z-index:9}
"""

_SCRIPT = """
const tip=document.getElementById('tip');
const show=(event,text)=>{tip.textContent=text;tip.style.display='block';
  const left=event.clientX+14+tip.offsetWidth>innerWidth?event.clientX-14-tip.offsetWidth:event.clientX+14;
  tip.style.left=left+'px';tip.style.top=event.clientY+14+'px'};
const hide=()=>tip.style.display='none';
document.querySelectorAll('svg[data-hover]').forEach(svg=>{
  const chart=JSON.parse(svg.dataset.hover);
  const box=svg.viewBox.baseVal;
  const cursor=document.createElementNS(svg.namespaceURI,'line');
  cursor.setAttribute('class','cursor');cursor.setAttribute('y1',12);cursor.setAttribute('y2',box.height-42);
  svg.addEventListener('mousemove',event=>{
    const area=svg.getBoundingClientRect(),pixel=(event.clientX-area.left)/area.width*box.width;
    const wanted=chart.low+(pixel-chart.start)/(chart.stop-chart.start)*(chart.high-chart.low);
    let step=null,lines=[];
    for(const line of chart.series){
      let best=-1;
      line.x.forEach((x,i)=>{if(line.y[i]!==null&&(best<0||Math.abs(x-wanted)<Math.abs(line.x[best]-wanted)))best=i});
      if(best<0)continue;
      if(step===null)step=line.x[best];
      const other=line.x[best]===step?'':' ('+chart.name+' '+line.x[best]+')';
      lines.push(line.label+': '+line.y[best]+other)}
    if(step===null)return hide();
    const x=chart.start+(step-chart.low)/(chart.high-chart.low)*(chart.stop-chart.start);
    cursor.setAttribute('x1',x);cursor.setAttribute('x2',x);svg.append(cursor);
    show(event,chart.name+' '+step+'\\n'+lines.join('\\n'))});
  svg.addEventListener('mouseleave',()=>{cursor.remove();hide()})});
const pixels=new WeakMap();
const read=image=>{if(!pixels.has(image)){
  const [rows,columns]=image.dataset.shape.split(',').map(Number);
  const canvas=Object.assign(document.createElement('canvas'),{width:columns,height:rows});
  const entry={rows,columns,data:null};pixels.set(image,entry);
  const source=new Image();
  source.onload=()=>{const pen=canvas.getContext('2d');pen.drawImage(source,0,0);
    entry.data=pen.getImageData(0,0,columns,rows).data};
  source.src=image.getAttribute('href')}
  return pixels.get(image)};
document.querySelectorAll('image.heat').forEach(image=>{
  const home=image.closest('[data-cap]').dataset,cap=Number(home.cap);
  const steps=home.steps&&JSON.parse(home.steps),names=home.rows&&JSON.parse(home.rows);
  image.addEventListener('mousemove',event=>{
    const {rows,columns,data}=read(image),area=image.getBoundingClientRect();
    const at=(share,n)=>Math.max(0,Math.min(n-1,Math.floor(share*n)));
    const row=at((event.clientY-area.top)/area.height,rows),column=at((event.clientX-area.left)/area.width,columns);
    const place=steps?image.dataset.layer+', expert '+row+', step '+steps[column]:names[row]+', expert '+column;
    let load='';
    if(data){const i=4*(row*columns+column),strength=data[i+3]/255;
      const ratio=Math.pow(cap,data[i]>data[i+2]?strength:-strength);
      load='\\n'+(strength>.995?(ratio>1?'at least ':'at most '):'about ')+ratio.toPrecision(2)+' x mean load'}
    show(event,place+load)});
  image.addEventListener('mouseleave',hide)});
"""


def page(title: str, body: str) -> str:
    """Return a whole HTML document that loads nothing from elsewhere."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>"
        f'<body><main>{body}</main><div id="tip"></div><script>{_SCRIPT}</script></body></html>\n'
    )
